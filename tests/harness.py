"""What every test of an op needs: its outcome on given inputs, and the numerics contract."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_map

ULPS = {torch.float32: 16, torch.float16: 2, torch.bfloat16: 2}
ULPS |= {torch.float8_e4m3fn: 1, torch.float8_e5m2: 1}  # a code beside a tie may go either way


def clones(inputs: Any) -> Any:
    """The same values in fresh tensors, each with its strides and its requires_grad."""

    def clone(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        return t.detach().clone().requires_grad_(t.requires_grad)

    return tree_map(clone, inputs)


def doubled(inputs: Any) -> Any:
    """The same values in float64; integers stay as they are."""

    def double(t: Any) -> Any:
        if not isinstance(t, Tensor) or not t.is_floating_point():
            return t
        return t.detach().double().requires_grad_(t.requires_grad)

    return tree_map(double, inputs)


def named_tensors(tree: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in the tree with its place there, as ``['input']`` or ``['params'][0]``."""
    for path, leaf in tree_flatten_with_path(tree)[0]:
        if isinstance(leaf, Tensor):
            yield keystr(path), leaf


def outcome(fn: Callable[..., Any], inputs: dict[str, Any], seed: int = 1) -> dict[str, Tensor]:
    """All that a call gives or changes: results, gradients, and every tensor argument after it."""
    inputs = clones(inputs)
    found: dict[str, Tensor] = {}
    outputs = list(named_tensors(fn(**inputs)))
    generator = torch.Generator().manual_seed(seed)
    graded = [o for _, o in outputs if o.requires_grad]
    noise = [torch.randn(o.shape, dtype=torch.float64, generator=generator) for o in graded]
    if graded:
        torch.autograd.backward(graded, [g.to(o) for g, o in zip(noise, graded, strict=True)])
    for name, out in outputs:
        found[f"result{name}"] = out.detach()
    for name, t in named_tensors(inputs):
        found[f"{name} after"] = t.detach()
        if t.grad is not None:
            found[f"gradient of {name}"] = t.grad
    return found


def assert_bitwise_equal(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(
            got[name],
            value,
            rtol=0,
            atol=0,
            equal_nan=True,
            msg=lambda m, name=name: f"{name}: {m}",
        )


def assert_within_contract(
    fused: dict[str, Tensor], eager: dict[str, Tensor], exact: dict[str, Tensor]
) -> None:
    """``max|fused - exact| <= 2 max|eager - exact| + c ulp(max|exact|)``, NaN and inf in place."""
    assert fused.keys() == exact.keys()
    for name, truth in exact.items():
        got, peer = fused[name], eager[name]
        assert got.dtype == peer.dtype, f"{name}: dtype {got.dtype}, eager gives {peer.dtype}"
        assert got.shape == truth.shape, f"{name}: shape {got.shape}, eager gives {truth.shape}"
        if not truth.is_floating_point() or truth.numel() == 0:
            assert torch.equal(got, peer), f"{name} differs"
            continue
        truth = truth.double()
        finite = truth.isfinite()
        special = torch.where(finite, torch.zeros_like(truth), truth)
        torch.testing.assert_close(
            torch.where(finite, torch.zeros_like(truth), got.double()),
            special,
            rtol=0,
            atol=0,
            equal_nan=True,
            msg=lambda m, name=name: f"{name}, where float64 is not finite: {m}",
        )
        if not finite.any():
            continue
        truth, got, peer = truth[finite], got[finite].double(), peer[finite].double()
        kind = fused[name].dtype
        ulp = torch.finfo(kind).eps * truth.abs().max()
        peer_error = (peer - truth).abs().nan_to_num(nan=0.0, posinf=0.0).max()
        allowed = 2 * peer_error + ULPS[kind] * ulp
        error = (got - truth).abs().max()
        assert error <= allowed, (
            f"{name}: error {error:.3e} against float64, {allowed:.3e} allowed "
            f"(eager {peer_error:.3e}, largest value {truth.abs().max():.3e})"
        )


def check(op: Any, inputs: dict[str, Any]) -> None:
    """Holds ``op.fused`` to the numerics contract on these inputs."""
    exact = outcome(op.reference, doubled(inputs))
    assert_within_contract(outcome(op.fused, inputs), outcome(op.reference, inputs), exact)
