"""``powertrain.deferred``: models are built without memory, and what building them would have done is recorded."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from powertrain.compat import TorchDispatchMode, has_argument, operator_name, written
from powertrain.errors import BirthError
from powertrain.nest import leaves, map_tensors
from powertrain.tape import Constant, Draw, Record, Tape, entry_of

_META = torch.device("meta")
_CPU = torch.device("cpu")
_MARK = 0x504F57 << 36
"""Seeds that nobody chooses: a generator that was seeded with ``_MARK + n`` stands after record n."""

_DRAWS = frozenset(["normal_", "uniform_", "random_", "exponential_", "geometric_", "log_normal_", "cauchy_"])
_FILLS = _DRAWS | {"bernoulli_", "rand_like", "randn_like", "randint_like"}
"""Random operators that draw as many numbers whatever their one tensor holds."""

_OVERWRITES = _DRAWS | {"zero_", "fill_", "copy_"}
_MASKS = (torch.bool, torch.uint8)
_READS_VALUES = (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__, torch.Tensor.item)
_INITIALISERS = Path(str(torch.nn.init.__file__))


@contextmanager
def deferred() -> Iterator[None]:
    """Build modules inside the block without allocating their parameters and buffers.

    They are on the meta device, and the construction is recorded, so that
    ``powertrain.initialize`` can compute the first value of each later, alone:
    bit-equal to the same construction run at once under the same seed, on whichever
    rank and in whichever order. Random generators are left as they were found.

    >>> with powertrain.deferred():  # doctest: +SKIP
    ...     model = GPT(width=12288, depth=96)

    What the construction asks for is taken at the end of the block: change nothing
    of the model between the block and ``initialize``, or change it inside the block.

    Raises:
        BirthError: the construction depends on a value (``.item()``, ``if tensor:``), or uses
            something that cannot be recorded; with the line of the model's code.
    """
    if entry_of(torch.empty(0)) is not None:  # inside another block, which records all of it
        yield
        return
    recorder = _Recorder()
    try:
        with _Surface(recorder), recorder:
            yield
    finally:
        recorder.generators.restore()


class _Generators:
    """Knows after which operation a generator stands, although none of them has run.

    Instead of being advanced, a generator is seeded with a mark. Code that saves
    and restores states, or seeds, thereby moves between marks as it would between states.
    """

    def __init__(self) -> None:
        self.entry = torch.get_rng_state()
        self._found = [(torch.default_generator, self.entry)]

    def source(self, generator: torch.Generator | None) -> int | torch.Tensor:
        """Return the record after which the generator stands, or its state if it was set to one."""
        generator = generator or torch.default_generator
        if generator.device.type != "cpu":
            raise BirthError(
                "a generator of a device was used in a deferred construction",
                where=_site(),
                expected="a generator of the CPU: the values may not depend on the device",
                found=str(generator.device),
                remedy="make it with torch.Generator()",
            )
        state = generator.get_state()
        if all(generator is not known for known, _ in self._found):
            self._found.append((generator, state))
        if generator is torch.default_generator and torch.equal(state, self.entry):
            return -1
        mark = generator.initial_seed()
        if _is_mark(mark) and torch.equal(state, torch.Generator().manual_seed(mark).get_state()):
            return mark - _MARK
        return state

    def mark(self, generator: torch.Generator | None, index: int) -> None:
        """Note that the generator stands after a record."""
        (generator or torch.default_generator).manual_seed(_MARK + index)

    def restore(self) -> None:
        """Take the marks away: a generator that nobody seeded is as it was."""
        for generator, state in self._found:
            if _is_mark(generator.initial_seed()):
                generator.set_state(state)


class _Recorder(TorchDispatchMode):
    """Runs operators on the meta device, and writes down those that make or change content."""

    def __init__(self) -> None:
        super().__init__()
        self.generators = _Generators()
        self.tape = Tape(self.generators.entry)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator: on real tensors as ever, otherwise without content."""
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in leaves([args, kwargs]) if isinstance(leaf, torch.Tensor)]
        metas = [tensor for tensor in tensors if tensor.is_meta]
        targets = list(written(func, args, kwargs))
        if metas and _asks_for_values(func, tensors):
            raise _dependent(operator_name(func))
        # ``new_*`` takes only type and device from its tensor: it makes memory as a factory does.
        factory = not metas and (not tensors or operator_name(func).startswith("new_"))
        if (not metas and not factory) or (not tensors and not has_argument(func, "device")):
            return self._really(func, args, kwargs)
        if any(not target.is_meta for target in targets):  # a real tensor takes real values
            return self._really(func, *map_tensors(_evaluate, [args, kwargs]))
        return self._defer(func, args, kwargs, tensors, targets, factory=factory)

    def _really(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            generator = kwargs.get("generator") or torch.default_generator
            source = self.generators.source(generator)
            if isinstance(source, int):  # from here on its state is a real one, and as such it is recorded
                generator.set_state(self.tape.state_after(source))
        return func(*args, **kwargs)

    def _defer(
        self,
        func: Any,
        args: Any,
        kwargs: dict[str, Any],
        tensors: list[torch.Tensor],
        targets: list[torch.Tensor],
        *,
        factory: bool,
    ) -> Any:
        name = operator_name(func)
        device = kwargs.get("device")
        generator = kwargs.pop("generator", None)
        kwargs.pop("pin_memory", None)
        before = [(entry_of(tensor), tensor) for tensor in tensors]
        recorded = map_tensors(_template, [list(args), kwargs])
        call = map_tensors(_meta, [args, kwargs])
        if has_argument(func, "device") and (factory or device is not None):
            call[1]["device"], recorded[1]["device"] = _META, _CPU
        try:
            result = func(*call[0], **call[1])
        except NotImplementedError as error:
            raise BirthError(
                f"the operator {name} cannot be deferred: {str(error).splitlines()[0]}",
                where=_site(),
                remedy="build this part of the model outside of powertrain.deferred()",
            ) from error
        outputs = [leaf for leaf in leaves(result) if isinstance(leaf, torch.Tensor)]
        for entry, tensor in before:
            if entry is not None and entry.tape is self.tape:
                self.tape.grow(entry.index, tensor.untyped_storage().nbytes())
        if torch.Tag.inplace_view in func.tags:  # it changes how a tensor is looked at
            return result
        foreign = any(t.is_meta and (entry is None or entry.tape is not self.tape) for entry, t in before)
        if any(output.layout != torch.strided for output in outputs):
            raise BirthError("only dense tensors can be deferred", where=_site(), found=str(outputs[0].layout))
        new = [entry_of(output) is None for output in outputs]
        if not targets and (not any(new) or foreign):
            if foreign and any(new) and not _is_view(outputs, tensors):
                raise _foreign(name)
            return result
        if foreign:
            raise _foreign(name)
        own = _place(device, [entry.device for entry, _ in before if entry is not None])
        refs = []
        for output in outputs:
            entry = entry_of(output)
            refs.append(None if entry else self.tape.add_storage(output.untyped_storage(), own).ref(output))
        if name.startswith(("empty", "new_empty")):  # it has no content
            return result
        if factory and has_argument(func, "dtype") and kwargs.get("dtype") is None:
            recorded[1]["dtype"] = outputs[0].dtype
        draw = None
        if torch.Tag.nondeterministic_seeded in func.tags:
            pure = not tensors or (len(tensors) == 1 and name in _FILLS)
            draw = Draw(self.generators.source(generator), pure, has_argument(func, "generator"))
        self._add(func, recorded, refs, tensors, targets, name in _OVERWRITES, draw, generator)
        return result

    def _add(
        self,
        function: Any,
        recorded: list[Any],
        refs: list[Any],
        tensors: list[torch.Tensor],
        targets: list[torch.Tensor],
        overwrites: bool,
        draw: Draw | None,
        generator: torch.Generator | None,
    ) -> None:
        read = [entry.index for tensor in tensors if (entry := entry_of(tensor)) is not None]
        writes = {entry.index for target in targets if (entry := entry_of(target)) is not None}
        covered = None
        if overwrites and len(targets) == 1 and (entry := entry_of(targets[0])) is not None:
            whole = entry.ref(targets[0]).covers(self.tape.nbytes(entry.index))
            if whole and read.count(entry.index) == 1:
                covered = entry.index
                read.remove(covered)
        index = self.tape.add(
            Record(
                function=function,
                args=tuple(recorded[0]),
                kwargs=recorded[1],
                outputs=tuple(refs),
                reads=frozenset(read),
                writes=frozenset(writes | {ref.storage for ref in refs if ref is not None}),
                covered=covered,
                draw=draw,
                dtype=torch.get_default_dtype(),
            )
        )
        if draw is not None:
            self.generators.mark(generator, index)

    def initialiser(self, tensor: torch.Tensor, frame: FrameType) -> None:
        """Record a call of one of torch's initialisers as one operation."""
        code = frame.f_code
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        values = {name: frame.f_locals[name] for name in names}
        generator = values.pop("generator", None)
        recorded = map_tensors(_template, [[], values])
        # Without a generator of its own, the parts of an initialiser share the default one.
        draw = Draw(self.generators.source(generator), True, generator is not None)
        function = frame.f_globals[code.co_name]
        self._add(_Quiet(function), recorded, [], [tensor], [tensor], True, draw, generator)


class _Quiet:
    """Calls an initialiser for its effect: what it returns is what it was given."""

    def __init__(self, function: Any) -> None:
        self._function = function

    def __call__(self, **kwargs: Any) -> None:
        self._function(**kwargs)


class _Surface(TorchFunctionMode):
    """Answers questions about deferred tensors as the real ones would, and refuses those about values."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self._recorder = recorder
        tensor = torch.Tensor
        members: tuple[Any, ...] = (tensor.is_meta, tensor.is_cpu, tensor.device)
        self._is_meta, self._is_cpu, self._device = (member.__get__ for member in members)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See a call of torch's Python surface."""
        kwargs = kwargs or {}
        tensor = args[0] if args else None
        entry = entry_of(tensor) if isinstance(tensor, torch.Tensor) and tensor.is_meta else None
        if entry is not None and isinstance(tensor, torch.Tensor):
            if func == self._is_meta:
                return self._skips(tensor, inspect.currentframe())
            if func == self._is_cpu:
                return entry.device.type == "cpu"
            if func == self._device:
                return entry.device
            if func in _READS_VALUES:
                raise _dependent(func.__name__)
            if func is torch.Tensor.new_tensor:
                kwargs = {"device": entry.device, "dtype": tensor.dtype, **kwargs}
            if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
                args = (tensor, _numbers(args[1]), *args[2:])
        return func(*args, **kwargs)

    def _skips(self, tensor: torch.Tensor, frame: FrameType | None) -> bool:
        """Answer whether a tensor is on the meta device: never, unless one of torch's initialisers asks.

        Those skip such tensors. Some draw until a condition holds, so they are recorded whole.
        """
        caller = frame.f_back if frame is not None else None
        if caller is None or Path(caller.f_code.co_filename) != _INITIALISERS:
            return False
        entry = entry_of(tensor)
        if entry is None or entry.tape is not self._recorder.tape:
            raise _foreign(caller.f_code.co_name)
        self._recorder.initialiser(tensor, caller)
        return True


def _asks_for_values(func: Any, tensors: list[torch.Tensor]) -> bool:
    if not {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags):
        return False
    # The shape of what is indexed depends on masks alone, and real masks were made numbers (``_numbers``).
    return operator_name(func) != "index" or any(tensor.dtype in _MASKS for tensor in tensors[1:])


def _numbers(index: Any) -> Any:
    """Return an index with real tensors for its lists and masks: torch would put lists on the device, a meta one."""
    if isinstance(index, tuple):
        parts: list[Any] = []
        for part in index:
            made = _numbers(part)
            parts.extend(made) if isinstance(made, tuple) else parts.append(made)
        return tuple(parts)
    if isinstance(index, (list, range)) and all(isinstance(item, (int, list)) for item in index):
        index = torch.tensor(list(index)) if len(index) else torch.empty(0, dtype=torch.int64, device=_CPU)
    elif type(index).__module__ == "numpy" and hasattr(index, "ndim") and index.ndim:
        index = torch.as_tensor(index)
    if isinstance(index, torch.Tensor) and index.dtype in _MASKS and index.ndim and not index.is_meta:
        return index.nonzero(as_tuple=True)
    return index


def _template(tensor: torch.Tensor) -> Any:
    entry = entry_of(tensor)
    if entry is not None:
        return entry.ref(tensor)
    return Constant.keep(tensor) if not tensor.is_meta else None


def _meta(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_meta:
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=_META)


def _evaluate(tensor: torch.Tensor) -> torch.Tensor:
    entry = entry_of(tensor) if tensor.is_meta else None
    return tensor if entry is None else entry.value(tensor)


def _place(device: Any, inherited: list[torch.device]) -> torch.device:
    """Return where a new tensor would rest had it not been deferred."""
    if device is not None and torch.device(device) != _META:
        return torch.device(device)
    return inherited[0] if inherited else _CPU


def _is_view(outputs: list[torch.Tensor], tensors: list[torch.Tensor]) -> bool:
    own = [tensor.untyped_storage() for tensor in tensors]
    return all(any(output.untyped_storage() is storage for storage in own) for output in outputs)


def _dependent(what: str) -> BirthError:
    return BirthError(
        f"the model's construction depends on the value of a deferred tensor ({what})",
        where=_site(),
        remedy="compute it with Python numbers or torch.tensor([...]), or build this part "
        "outside of powertrain.deferred()",
    )


def _foreign(what: str) -> BirthError:
    return BirthError(
        f"the construction uses the content of a meta tensor that was not made in this block ({what})",
        where=_site(),
        remedy="build all of the model in one `with powertrain.deferred():` block",
    )


def _site() -> str:
    """Return ``file:line`` of the code that is being run, below torch and this package."""
    ours = (Path(__file__).parent, Path(str(torch.__file__)).parent)
    frame = inspect.currentframe()
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        below = any(own in path.parents for own in ours) or path.name == "contextlib.py"
        if path.is_absolute() and not below:
            return f"{path}:{frame.f_lineno}"
        frame = frame.f_back
    return "unknown"


def _is_mark(seed: int) -> bool:
    return _MARK <= seed < _MARK + 2**36
