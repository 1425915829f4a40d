"""The ``[recompute]`` table."""

from __future__ import annotations

from typing import Any, Literal

import attrs
from attrs import validators

from powertrain.text import did_you_mean
from powertrain_recompute.sets import ALIASES, SETS

Policy = Literal["none", "full", "every", "selective", "budget"]

OWN = {"every": "every", "save": "selective", "budget": "budget"}
"""Which policy a key belongs to."""


@attrs.frozen(kw_only=True)
class RecomputeConfig:
    """What is computed again in backward, in place of being kept since forward."""

    policy: Policy = "full"
    """"full": each block keeps its inputs and runs again in backward. "every": so does each k-th block. "selective":
    so does each block, but for the results of some operators. "budget": torch.compile compiles each block and
    chooses what is kept. "none": nothing is computed again. Default "full"."""

    every: int | None = attrs.field(default=None, validator=validators.optional(validators.ge(1)))
    """Policy "every": of so many blocks the first is recomputed. 1: all of them. Default 2."""

    save: list[str] | None = attrs.field(default=None)
    """Policy "selective": operators whose results are kept: "matmul" (or "mm"), "attention" ("sdpa"), "convolution"
    ("conv"), "norm", or an operator of torch such as "aten.mm.default" ("aten.mm": all its overloads). Default:
    matmul and attention."""

    budget: float | None = attrs.field(
        default=None, validator=validators.optional([validators.ge(0), validators.le(1)])
    )
    """Policy "budget": the share that may be kept of the activations that compiled code would keep, 0 to 1. 0: only
    what goes into a block. Default 0.5."""

    blocks: str | list[str] | None = None
    """The modules that are recomputed: a class by name, or the paths of modules ("layers.*" counts as each of them).
    Absent: the model's repeated block."""

    @save.validator
    def _known(self, attribute: attrs.Attribute[Any], value: list[str] | None) -> None:
        if value is not None and not value:
            raise ValueError('save names no operator; policy = "full" keeps no results')
        for name in value or ():
            words = name.split(".")
            if name in SETS or name in ALIASES or (len(words) in (2, 3) and all(words)):
                continue
            known = [*SETS, *ALIASES]
            raise ValueError(
                f"unknown operators {name!r}{did_you_mean(name, known) or '.'} Expected one of {', '.join(known)}, or "
                'the name of an operator of torch such as "aten.mm.default"'
            )

    def __attrs_post_init__(self) -> None:
        if self.policy == "none":
            return  # who switches it off for a run keeps the rest of the table
        for key, policy in OWN.items():
            if getattr(self, key) is not None and policy != self.policy:
                raise ValueError(f'{key} belongs to policy = "{policy}", but the policy is "{self.policy}"')
