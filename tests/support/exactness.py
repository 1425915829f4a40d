"""How far results are from exact ones, in units of their last place."""

from __future__ import annotations

import torch


def ulps(found: torch.Tensor, exact: torch.Tensor, beside: torch.Tensor | None = None) -> torch.Tensor:
    """Return the distance of each element from ``exact`` (fp64), in units in the last place of ``found``'s type.

    Args:
        found: what was computed.
        exact: the same in fp64.
        beside: terms of a sum (fp64), where they may be larger than it: the unit is then theirs, because what is
            left of two numbers that cancel out has their error.
    """
    kind = torch.finfo(found.dtype)
    size = exact.abs() if beside is None else torch.maximum(exact.abs(), beside.abs().nan_to_num())
    exponent = torch.frexp(size.clamp(min=kind.smallest_normal, max=kind.max))[1]
    digits = round(-torch.log2(torch.tensor(kind.eps)).item())
    return (found.double() - exact).abs() / torch.exp2((exponent - 1 - digits).double())


def assert_as_exact(
    found: torch.Tensor,
    reference: torch.Tensor,
    exact: torch.Tensor,
    what: str = "",
    beside: torch.Tensor | None = None,
) -> None:
    """Fail unless ``found`` is at most twice as far from ``exact`` as ``reference``, plus one unit in the last place.

    The error of a tensor is that of its worst element. Where the exact result is no finite number of the type, both
    must be the same.
    """
    assert found.dtype == reference.dtype, what
    found, reference, exact = found.cpu().flatten(), reference.cpu().flatten(), exact.cpu().flatten()
    beside = None if beside is None else beside.cpu().flatten()
    finite = exact.isfinite() & (exact.abs() <= torch.finfo(found.dtype).max)
    same = (found == reference) | (found.isnan() & reference.isnan())
    assert bool((same | finite).all()), f"{what}: {found[~same & ~finite][:4]} for {reference[~same & ~finite][:4]}"
    # Where a step on the way leaves the range of fp32 for the reference, it may for the kernel.
    judged = finite & reference.isfinite()
    if not judged.any():
        return
    own, theirs = (ulps(side, exact, beside)[judged] for side in (found, reference))
    allowed = 2 * theirs.max() + 1
    worst = int(own.nan_to_num(nan=float("inf")).argmax())
    assert own[worst] <= allowed, (
        f"{what}: off by {own[worst]:.3g} ulp where {allowed:.3g} are allowed: "
        f"{found[judged][worst]} for {exact[judged][worst]}"
    )
