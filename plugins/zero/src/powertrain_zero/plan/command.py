"""``powertrain plan``: what a rank will need, before anything is allocated."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import attrs
import click

from powertrain_zero.plan.settings import Settings, load_settings, make_recipe, on_host, rests_of

if TYPE_CHECKING:
    import torch

    from powertrain_zero.plan.activations import Activations
    from powertrain_zero.plan.changes import Choice
    from powertrain_zero.plan.estimate import Need
    from powertrain_zero.plan.probe import OptimizerFacts

STAGES: tuple[Literal[0, 1, 2, 3], ...] = (0, 1, 2, 3)
FORMATS = ("fp32", "bf16", "fp16", "int64", "int32", "bool")


@click.command()
@click.argument("config", type=click.Path(dir_okay=False))
@click.option(
    "--model", "spec", required=True, metavar="MODEL",
    help="package.module:callable, file.py:callable, or a Hugging Face configuration (directory or config.json).",
)  # fmt: skip
@click.option("--model-args", default="{}", metavar="JSON", help="Keyword arguments of the callable.")
@click.option(
    "--ranks", type=click.IntRange(min=1), metavar="N", help="Data ranks; default: what [batch] implies, or 1."
)
@click.option("--batch", type=click.IntRange(min=1), metavar="N", help="Samples for the activations; default: micro.")
@click.option(
    "--sequence", type=click.IntRange(min=1), metavar="N", help="Positions in a sample; default: the model's."
)
@click.option(
    "--input", "inputs", multiple=True, metavar="NAME=SHAPE:FORMAT",
    help="An argument of forward, for example image=8x3x224x224:fp32. May be repeated.",
)  # fmt: skip
@click.option("--limit", metavar="SIZE", help="Exit with 1 when a rank needs more: 24GB, 512MiB, or `free`.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key: batch.micro=4.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON; sizes in bytes.")
@click.pass_context
def plan(
    ctx: click.Context,
    config: str,
    spec: str,
    model_args: str,
    ranks: int | None,
    batch: int | None,
    sequence: int | None,
    inputs: Sequence[str],
    limit: str | None,
    overrides: Sequence[str],
    as_json: bool,
) -> None:
    """Say how much memory each rank will need, under CONFIG and under each stage of ZeRO.

    The model is built on the meta device: nothing of it is allocated, so a model may be larger than
    this machine. An optimizer, scheduler or loss function that a script passes to powertrain.initialize
    is not seen.
    """
    from powertrain_zero.plan.probe import probe_beside
    from powertrain_zero.plan.view import echo_changes, echo_needs, parse_size

    arguments = _arguments(model_args)
    wanted = None if limit is None or limit == "free" else parse_size(limit)
    settings = load_settings(config, overrides, ranks)
    described = _inputs(inputs)
    optimizer = probe_beside(settings)  # before the model and what it imports: it weighs the process
    from powertrain_zero.plan.model import build_model

    planner = Planner(settings, build_model(spec, arguments), optimizer, batch, sequence, described)
    planner.activations(planner.now())
    if limit == "free":
        wanted = free_memory(settings)
    needs = {"config": planner.need(planner.now())}
    needs |= {str(stage): planner.need(attrs.evolve(planner.now(), stage=stage)) for stage in STAGES}
    peak = needs["config"].peak + planner.fixed
    fits = wanted is None or peak <= wanted
    changes = [] if fits or wanted is None else planner.changes(wanted)
    if as_json:
        click.echo(json.dumps(planner.report(spec, needs, wanted, fits, changes), indent=2))
    else:
        click.echo(planner.headline(spec))
        echo_needs(needs, planner.fixed, wanted)
        for note in planner.notes():
            click.echo(f"- {note}")
        if not fits and wanted is not None:
            echo_changes(changes, planner.fixed, wanted, peak)
    if not fits:
        ctx.exit(1)


class Planner:
    """Estimates choices for one model and configuration.

    Args:
        settings: the configuration.
        model: on the meta device.
        optimizer: tells what it keeps, when it is asked.
        batch: samples for the activations; None: the micro-batch.
        sequence: positions in a sample; None: what the model says.
        inputs: described arguments of forward: shape and format by name.
    """

    def __init__(
        self,
        settings: Settings,
        model: torch.nn.Module,
        optimizer: Callable[[], OptimizerFacts],
        batch: int | None,
        sequence: int | None,
        inputs: Mapping[str, tuple[tuple[int, ...], str]],
    ) -> None:
        self._settings = settings
        self._model = model
        self._probed = optimizer
        self._batch = batch or settings.batch.micro
        self._sequence = sequence
        self._inputs = inputs
        self._host = on_host(settings.config)
        self._rests = rests_of(settings.config)
        self._measured: dict[tuple[int, str], Activations] = {}

    @cached_property
    def optimizer(self) -> OptimizerFacts:
        """What the optimizer keeps."""
        return self._probed()

    @cached_property
    def whole(self) -> frozenset[str] | None:
        """The parameters that the optimizer must see whole."""
        from powertrain_zero.plan.settings import whole_names

        return whole_names(self._settings.config, self._model)

    @property
    def fixed(self) -> int:
        """The bytes of the process itself, where they share the memory of tensors."""
        return self.optimizer.process if self._host else 0

    def now(self) -> Choice:
        """Return what the configuration says."""
        from powertrain_zero.plan.changes import Choice

        settings = self._settings
        return Choice(
            stage=0 if settings.zero is None else settings.zero.stage,
            ranks=settings.ranks,
            micro=self._batch,
            accumulation=settings.batch.accumulation,
            compute=settings.config.precision.compute,
        )

    def need(self, choice: Choice) -> Need:
        """Return what a choice needs."""
        from powertrain_zero.plan.estimate import Case, estimate, with_stage

        recipe = make_recipe(self._settings.config, compute=choice.compute)
        zero = with_stage(self._settings.zero, choice.stage)
        case = Case(
            zero=zero,
            ranks=choice.ranks,
            recipe=recipe,
            on_host=self._host,
            accumulation=choice.accumulation,
            whole=None if self.optimizer.pieces else self.whole,
            rests=self._rests,
        )
        return estimate(self._model, case, self.optimizer, self.activations(choice))

    def activations(self, choice: Choice) -> Activations:
        """Return what forward and backward need for a choice's micro-batch and format."""
        key = (choice.micro, choice.compute)
        if key not in self._measured:
            self._measured[key] = self._measure(*key)
        return self._measured[key]

    def _measure(self, samples: int, compute: str) -> Activations:
        import torch

        from powertrain_zero.plan.activations import Activations, measure, sample_batch

        given = {}
        for name, (shape, form) in self._inputs.items():
            scaled = (max(1, shape[0] * samples // self._batch), *shape[1:]) if shape else shape
            given[name] = torch.empty(scaled, dtype=_dtype(form), device="meta")
        batch = sample_batch(self._model, samples, self._sequence, given)
        if isinstance(batch, str):
            return Activations(reason=batch)
        recipe = make_recipe(self._settings.config, compute=compute)
        found = measure(self._model, batch, dtype=recipe.compute)
        if recipe.autocast and found.peak is not None:
            # What autocast converts it keeps until the pass is over.
            copies = sum(p.numel() for p in self._model.parameters() if p.ndim > 1) * recipe.compute.itemsize
            found = attrs.evolve(found, peak=found.peak + copies)
        return found

    def changes(self, limit: int) -> list[Any]:
        """Return changes that make it fit."""
        from powertrain.errors import ShardingError
        from powertrain_zero.plan.changes import fitting

        def fits(choice: Choice) -> Need | None:
            try:
                need = self.need(choice)
            except ShardingError:
                return None
            return need if need.peak + self.fixed <= limit else None

        return fitting(self.now(), fits)

    # --- words ------------------------------------------------------------------------

    def headline(self, spec: str) -> str:
        """Return one line on what was planned."""
        numel = sum(param.numel() for param in self._model.parameters())
        now = self.now()
        found = self.activations(now)
        ranks = "1 rank" if now.ranks == 1 else f"{now.ranks} ranks"
        called = f"; called with {found.inputs}" if found.inputs else ""
        return f"{spec}: {numel:,} parameters, {self.optimizer.name}, {ranks}, micro-batch of {now.micro}{called}\n"

    def notes(self) -> list[str]:
        """Return what the numbers leave out, for people."""
        from powertrain_zero.plan.view import size

        now = self.now()
        found, need = self.activations(now), self.need(now)
        notes = ["the update begins when the activations have gone: of the two, the larger counts"]
        if found.peak is None:
            notes.append(f"activations could not be measured and are not counted: {found.reason}")
        elif not found.loss:
            notes.append("the model returns no loss: what loss_fn needs is not counted")
        if self._settings.config.precision.autocast:
            notes.append("activations under autocast are an approximation")
        process = size(self.optimizer.process) if self.optimizer.process else "an unknown amount"
        if self._host:
            notes.append(
                f"the process: Python, torch and Powertrain without tensors, {process} on this machine, measured"
            )
        else:
            notes.append(f"not counted: the device's own context; on the host, Python and torch need {process}")
        whole = size(need.birth_whole + self.fixed)
        notes.append(f"without powertrain.deferred() the model is built whole first: {whole} at birth")
        if "activations" in self._rests:
            notes.append("activations that rest elsewhere are counted as if they stayed")
        if self._settings.config.tables.get("recompute") is not None:
            notes.append("what [recompute] spares is not counted: activations are those of a model that keeps all")
        if self._settings.zero is None:
            notes.append("CONFIG has no [zero] section: it is stage 0")
        return notes

    def report(
        self, spec: str, needs: Mapping[str, Need], limit: int | None, fits: bool, changes: Sequence[Any]
    ) -> dict[str, Any]:
        """Return everything as JSON holds it."""
        from powertrain_zero.plan.view import as_dict

        now = self.now()
        found = self.activations(now)
        return {
            "model": spec,
            "parameters": sum(param.numel() for param in self._model.parameters()),
            "optimizer": self.optimizer.name,
            "ranks": now.ranks,
            "stage": now.stage,
            "batch": now.micro,
            "inputs": found.inputs,
            "saved_activations": None if found.peak is None else found.saved,
            "fixed": self.optimizer.process,
            "device": "host" if self._host else "accelerator",
            "needs": {name: as_dict(need, self.fixed) for name, need in needs.items()},
            "notes": self.notes(),
            "limit": limit,
            "fits": fits,
            "changes": [
                {"steps": list(change.steps), "process_peak": change.need.peak + self.fixed} for change in changes
            ],
        }


def free_memory(settings: Settings) -> int:
    """Return the memory that each rank could have here: a device's, or its part of the host's."""
    import torch

    if not on_host(settings.config):
        return int(torch.accelerator.get_memory_info()[0])
    try:
        import psutil
    except ImportError:
        raise click.UsageError("--limit free needs psutil: pip install psutil, or write a size: --limit 24GB") from None
    return int(psutil.virtual_memory().available) // settings.ranks


def _arguments(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise click.BadParameter(f"not JSON: {error}", param_hint="--model-args") from error
    if not isinstance(value, dict):
        raise click.BadParameter("expected an object, for example '{\"width\": 768}'", param_hint="--model-args")
    return value


def _inputs(texts: Sequence[str]) -> dict[str, tuple[tuple[int, ...], str]]:
    result = {}
    for text in texts:
        name, _, rest = text.partition("=")
        shape, _, form = rest.partition(":")
        form = form or "fp32"
        sides = shape.split("x")
        if not name or form not in FORMATS or not all(side.isdigit() and int(side) for side in sides):
            raise click.BadParameter(
                f"{text!r}: write NAME=SHAPE:FORMAT, for example tokens=8x128:int64; formats: {', '.join(FORMATS)}",
                param_hint="--input",
            )
        result[name] = (tuple(map(int, sides)), form)
    return result


def _dtype(form: str) -> torch.dtype:
    import torch

    names = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
    dtype: torch.dtype = getattr(torch, names.get(form, form))
    return dtype
