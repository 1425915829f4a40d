"""Layers and their gradients, against a float64 computation by autograd and the PyTorch reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from exactness import ulps

from powertrain.kernels import reference
from powertrain_triton import losses, norms, rotary, swiglu

TYPES = (torch.float32, torch.bfloat16, torch.float16)
of_types = pytest.mark.parametrize("dtype", TYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def results(function: Callable[..., Any], leaves: list[torch.Tensor], *rest: Any, **options: Any) -> list[torch.Tensor]:
    """Return what a function gives, and the gradients of its arguments for one random gradient of the result."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    found = function(*leaves, *rest, **options)
    found = found if isinstance(found, tuple) else (found,)
    slopes = [random(9 + index, *one.shape).to(one) for index, one in enumerate(found)]
    torch.autograd.backward(found, slopes)
    return [*(one.detach() for one in found), *(leaf.grad for leaf in leaves)]


def assert_close_enough(mine: list[torch.Tensor], theirs: list[torch.Tensor], exact: list[torch.Tensor]) -> None:
    """Fail unless results are at most twice as far from fp64 as the reference's, and an ulp of the largest element."""
    assert len(mine) == len(theirs) == len(exact)
    for index, (own, other, right) in enumerate(zip(mine, theirs, exact, strict=True)):
        assert own.dtype == other.dtype
        assert own.shape == other.shape
        beside = right.abs().max().expand_as(right) if right.numel() else None
        error, allowed = ulps(own, right, beside).max(), 2 * ulps(other, right, beside).max() + 1
        assert error <= allowed, f"result {index}: off by {error} ulp of the largest, where {allowed} are allowed"


def compare(
    mine: Callable[..., Any],
    exact: Callable[..., Any],
    leaves: list[torch.Tensor],
    rest: list[Any],
    dtype: torch.dtype,
    device: torch.device,
    **options: Any,
) -> None:
    """Run a kernel, its reference, and the formula in fp64 on the same rounded numbers."""
    given = [leaf.to(dtype).to(device) for leaf in leaves]
    name = mine.__name__
    own, other = (results(function, given, *rest, **options) for function in (mine, reference(name)))
    wide = [item.double() if isinstance(item, torch.Tensor) and item.is_floating_point() else item for item in rest]
    assert_close_enough(own, other, results(exact, [leaf.double() for leaf in given], *wide, **options))


def exact_rms(x: Any, weight: Any, eps: float) -> Any:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def exact_layer_norm(x: Any, weight: Any, *rest: Any) -> Any:
    bias, eps = rest if len(rest) == 2 else (None, *rest)
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


@of_types
@pytest.mark.parametrize("shape", [(1, 1), (33, 100), (2, 3, 128), (3, 2500), (40, 16)])
def test_norms(dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> None:
    """Rows of every length, fewer and more than a program takes, with and without bias."""
    x, weight, bias = random(1, *shape) * 3 + 0.5, random(2, shape[-1]), random(3, shape[-1])
    compare(norms.rms_norm, exact_rms, [x, weight], [1e-5], dtype, device)
    compare(norms.layer_norm, exact_layer_norm, [x, weight, bias], [1e-5], dtype, device)


def test_layer_norm_without_bias_of_rows_that_do_not_lie_together(device: torch.device) -> None:
    """None for the bias, and a transposed argument."""
    x = random(4, 20, 6).float().to(device).T
    weight = random(5, 20).float().to(device)
    torch.testing.assert_close(norms.layer_norm(x, weight, None, 1e-5), F.layer_norm(x, (20,), weight, None, 1e-5))
    torch.testing.assert_close(norms.rms_norm(x, weight, 1e-5), F.rms_norm(x, (20,), weight, 1e-5))


def test_norms_of_nothing(device: torch.device) -> None:
    """No rows give no rows, and gradients of zero."""
    x, weight = torch.zeros(0, 8, device=device, requires_grad=True), torch.ones(8, device=device, requires_grad=True)
    norms.rms_norm(x, weight, 1e-5).sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [0.0] * 8


def exact_rotary(q: Any, k: Any, cos: Any, sin: Any) -> Any:
    def turned(x: Any) -> Any:
        half = x.shape[-1] // 2
        tables = (table.view(-1, 1, *table.shape[-2:]) for table in (cos, sin))
        c, s = tables
        return x * c + torch.cat((-x[..., half:], x[..., :half]), -1) * s

    return turned(q), turned(k)


@of_types
@pytest.mark.parametrize(("heads", "groups", "dim"), [(4, 2, 16), (3, 1, 10), (1, 1, 64)])
@pytest.mark.parametrize("own_angles", [False, True])
def test_rotary(dtype: torch.dtype, heads: int, groups: int, dim: int, own_angles: bool, device: torch.device) -> None:
    """Fewer heads of keys, halves that are no power of two, angles for each of the batch or for all."""
    angles = (2, 3, dim) if own_angles else (3, dim)
    rest = [random(6, *angles).float().to(device), random(7, *angles).float().to(device)]
    compare(
        rotary.rotary, exact_rotary, [random(1, 2, heads, 3, dim), random(2, 2, groups, 3, dim)], rest, dtype, device
    )


def test_rotary_leaves_tensors_as_they_lie(device: torch.device) -> None:
    """Of heads that lie beside one another, as a projection leaves them, the results do too."""
    q, k = (random(seed, 2, 5, 4, 8).float().to(device).transpose(1, 2) for seed in (1, 2))
    cos, sin = random(3, 5, 8).float().to(device), random(4, 5, 8).float().to(device)
    turned, expected = rotary.rotary(q, k, cos, sin), reference("rotary")(q, k, cos, sin)
    torch.testing.assert_close(turned, expected)
    assert turned[0].stride() == q.stride()


@of_types
def test_swiglu(dtype: torch.dtype, device: torch.device) -> None:
    """Blocks and the rest of one, with gates far from zero."""
    gate, up = random(1, 7, 300) * 5, random(2, 7, 300)
    compare(swiglu.swiglu, lambda gate, up: F.silu(gate) * up, [gate, up], [], dtype, device)


@of_types
@pytest.mark.parametrize("width", [5, 1000, 9000])
def test_softmax_cross_entropy_in_place(dtype: torch.dtype, width: int, device: torch.device) -> None:
    """Losses are returned, scaled gradients lie where the logits were, and ignored rows have neither."""
    logits = (random(1, 5, width) * 4).to(dtype).to(device)
    logits[3] += 100
    targets = torch.tensor([0, width - 1, -1, 2, width // 2], device=device)
    scale = torch.tensor(0.25, device=device)
    mine, theirs, wide = logits.clone(), logits.clone(), logits.double().requires_grad_()
    own = losses.softmax_cross_entropy(mine, targets, scale, ignore_index=-1)
    other = reference("softmax_cross_entropy")(theirs, targets, scale, ignore_index=-1)
    exact = F.cross_entropy(wide, targets, ignore_index=-1, reduction="none")
    (exact.sum() * 0.25).backward()
    assert wide.grad is not None
    assert_close_enough([own, mine], [other, theirs], [exact.detach(), wide.grad])
    assert own[2] == 0
    assert not mine[2].any()


def exact_cross_entropy(hidden: Any, weight: Any, targets: Any, *, ignore_index: int = -100, chunk: int = 0) -> Any:
    return F.cross_entropy(hidden @ weight.T, targets, ignore_index=ignore_index)


@of_types
@pytest.mark.parametrize("chunk", [4, 7, 1024])
def test_linear_cross_entropy(dtype: torch.dtype, chunk: int, device: torch.device) -> None:
    """For chunks that divide the tokens and for others, with ignored tokens, a chunk of nothing but such included."""
    targets = torch.tensor([3, 1, -100, 7, -100, -100, -100, -100, 0, 6], device=device)
    leaves = [random(1, 10, 24), random(2, 50, 24) / 4]
    compare(losses.cross_entropy, exact_cross_entropy, leaves, [targets], dtype, device, chunk=chunk)


def test_linear_cross_entropy_of_ignored_tokens(device: torch.device) -> None:
    """Where no token counts the loss is no number, and gradients are zero, as torch has it."""
    hidden, weight = (random(seed, 4, 8).float().to(device).requires_grad_() for seed in (1, 2))
    loss = losses.cross_entropy(hidden, weight, torch.full((4,), -100, device=device))
    loss.backward()
    assert loss.isnan()
    assert hidden.grad is not None
    assert not hidden.grad.any()


def test_linear_cross_entropy_keeps_no_gradients_where_none_are_wanted(device: torch.device) -> None:
    """Without gradients the loss is the same, and a frozen weight gets none."""
    hidden, weight = (random(seed, 4, 8).float().to(device) for seed in (1, 2))
    targets = torch.tensor([0, 1, 2, 3], device=device)
    plain = losses.cross_entropy(hidden, weight, targets)
    assert not plain.requires_grad
    loss = losses.cross_entropy(hidden.requires_grad_(), weight, targets)
    loss.backward()
    assert weight.grad is None
    torch.testing.assert_close(loss.detach(), plain)


def test_small_losses_keep_their_gradients_in_fp16(device: torch.device) -> None:
    """A mean over many tokens times a loss scale has gradients that the mean's own would lose in fp16."""
    hidden, weight = ((random(seed, 64, 8) / 8).half().to(device) for seed in (1, 2))
    hidden.requires_grad_()
    loss = losses.cross_entropy(hidden, weight, torch.zeros(64, dtype=torch.int64, device=device)) * 2.0**-20
    (loss * 2.0**20).backward()
    wide = hidden.detach().double().requires_grad_()
    exact_cross_entropy(wide, weight.double(), torch.zeros(64, dtype=torch.int64, device=device)).backward()
    assert hidden.grad is not None
    assert wide.grad is not None
    torch.testing.assert_close(hidden.grad.double(), wide.grad, rtol=1e-2, atol=1e-6)


def test_a_mask_over_a_whole_block_of_logits(device: torch.device) -> None:
    """Where the first thousands of classes are masked, losses and gradients are those of the others."""
    logits = random(1, 2, 9000).float().to(device)
    logits[:, :4096] = -torch.inf
    targets = torch.tensor([5000, 8999], device=device)
    mine, theirs = logits.clone(), logits.clone()
    own = losses.softmax_cross_entropy(mine, targets)
    other = reference("softmax_cross_entropy")(theirs, targets)
    torch.testing.assert_close(own, other)
    torch.testing.assert_close(mine, theirs)


def test_a_target_that_is_no_class_is_no_number(device: torch.device) -> None:
    """Its loss cannot pass for one."""
    targets = torch.tensor([-1, 7, 3], device=device)
    found = losses.softmax_cross_entropy(torch.zeros(3, 7, device=device), targets)
    assert found.isnan().tolist() == [True, True, False]


def test_linear_cross_entropy_under_autocast(device: torch.device) -> None:
    """Products are of autocast's type, and gradients come back in fp32."""
    leaves = [random(seed, *shape).float().to(device).requires_grad_() for seed, shape in ((1, (6, 8)), (2, (9, 8)))]
    targets = torch.tensor([0, 1, 2, 3, 4, 8], device=device)
    with torch.autocast(device.type, torch.bfloat16):
        found = losses.cross_entropy(*leaves, targets)
    found.backward()
    assert [leaf.grad.dtype for leaf in leaves if leaf.grad is not None] == [torch.float32] * 2
    torch.testing.assert_close(found, F.cross_entropy(leaves[0] @ leaves[1].T, targets), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    "call",
    [
        lambda: norms.rms_norm(torch.ones(2, 8), torch.ones(7), 1e-5),
        lambda: norms.layer_norm(torch.ones(2, 8), torch.ones(8), torch.ones(1), 1e-5),
        lambda: rotary.rotary(torch.ones(1, 2, 4, 8), torch.ones(1, 2, 4, 8), torch.ones(4, 4), torch.ones(4, 4)),
        lambda: rotary.rotary(torch.ones(1, 2, 4, 8), torch.ones(1, 2, 4, 8), torch.ones(4, 8), torch.ones(3, 8)),
        lambda: rotary.rotary(torch.ones(1, 2, 4, 8), torch.ones(1, 2, 5, 8), torch.ones(4, 8), torch.ones(4, 8)),
    ],
)
def test_what_does_not_fit_is_refused(call: Any) -> None:
    """What would be read beyond a tensor's end is an error before anything runs."""
    with pytest.raises(ValueError, match=r"fit|differ|shapes"):
        call()
