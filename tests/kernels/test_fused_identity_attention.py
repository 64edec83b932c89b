"""The fused kernel of identity attention is its reference, forward and backward."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from proteus_deploy.errors import BackendError, InputError
from proteus_deploy.kernels import launch
from proteus_deploy.kernels.identity_attention import (
    FoldedIdentity,
    fold_identity_attention,
    folded_identity_attention,
    fused_identity_attention,
    fused_identity_attention_unfolded,
    identity_attention,
)
from proteus_deploy.testing import TOLERANCES, assert_close

Randn = Callable[..., Tensor]
SHAPES = {  # batch, identities, tokens N, queries Q, heads H, width d
    "one token": (1, 1, 1, 8, 2, 32),
    "odd": (2, 2, 37, 5, 3, 33),
    "one identity for the batch": (3, 1, 17, 32, 4, 48),
    "more tokens than a block": (1, 1, 67, 32, 2, 80),
    "two groups of heads": (1, 1, 5, 40, 15, 70),
    "one head, one query": (1, 1, 13, 1, 1, 24),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def problem(
    name: str, randn: Randn, dtype: torch.dtype = torch.float32, gate: float = 0.7
) -> tuple[Tensor, FoldedIdentity, Tensor, int]:
    batch, identities, tokens, queries, heads, width = SHAPES[name]
    columns = heads * queries
    folded = FoldedIdentity(
        2 * randn(identities, width, columns, dtype=dtype) / width**0.5,
        randn(identities, 1, columns, dtype=dtype),
        randn(identities, columns, width, dtype=dtype) / heads**0.5,
    )
    hidden = randn(batch, tokens, width, dtype=dtype)
    return hidden, folded, torch.tensor(gate, device=hidden.device), heads


def oracle(hidden: Tensor, folded: FoldedIdentity, gate: Tensor, heads: int) -> Tensor:
    """The reference in float64 on the CPU."""
    tensors = [x.detach().double().cpu() for x in (hidden, *folded, gate)]
    return folded_identity_attention(tensors[0], FoldedIdentity(*tensors[1:4]), gate=tensors[4], heads=heads)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("name", SHAPES)
def test_folded_inputs(name: str, dtype: torch.dtype, randn: Randn) -> None:
    hidden, folded, gate, heads = problem(name, randn, dtype)
    got = fused_identity_attention(hidden, folded, gate=gate, heads=heads)
    assert got.dtype == dtype
    want = oracle(hidden, folded, gate, heads)
    assert_close("hidden", got, want, TOLERANCES["kernel", name_of(dtype)])
    # The residual dwarfs a small update, so the update is held to the bound of a rounding of its own.
    update, wanted = (x.double().cpu() - hidden.double().cpu() for x in (got, want))
    bound = TOLERANCES["kernel", name_of(dtype)].bound * 3
    assert (update - wanted).norm() <= bound * want.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_unfolded_inputs(dtype: torch.dtype, randn: Randn) -> None:
    heads, size, width = 3, 8, 40
    weights = {
        "norm_weight": 1 + randn(width, dtype=dtype),
        "norm_bias": randn(width, dtype=dtype),
        "query_weight": randn(heads * size, width, dtype=dtype) / width**0.5,
        "out_weight": randn(width, heads * size, dtype=dtype) / (heads * size) ** 0.5,
    }
    key, value = (randn(1, 7, heads * size, dtype=dtype) for _ in range(2))
    hidden, gate = randn(2, 11, width, dtype=dtype), torch.tensor([0.5], device=key.device)
    got = fused_identity_attention_unfolded(hidden, key, value, gate=gate, heads=heads, **weights)
    exact = {name: x.double().cpu() for name, x in weights.items()}
    tensors = (x.double().cpu() for x in (hidden, key, value))
    want = identity_attention(*tensors, gate=gate.double().cpu(), heads=heads, **exact)
    assert_close("unfolded", got, want, TOLERANCES["kernel", name_of(dtype)])
    plain = fused_identity_attention_unfolded(
        hidden, key, value, gate=gate, heads=heads, backend="reference", **weights
    )
    assert torch.equal(plain, identity_attention(hidden, key, value, gate=gate, heads=heads, **weights))


def test_a_large_mean_cancels(randn: Randn) -> None:
    """The mean is taken off after the product; tokens far from zero must not suffer from it."""
    hidden, folded, gate, heads = problem("more tokens than a block", randn)
    hidden = hidden + 30
    got = fused_identity_attention(hidden, folded, gate=gate, heads=heads)
    want = oracle(hidden, folded, gate, heads)
    update, wanted = (x.double().cpu() - hidden.double().cpu() for x in (got, want))
    assert (update - wanted).norm() <= 1e-4 * wanted.norm()


@pytest.mark.parametrize("kinds", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_mixed_dtypes_compute_in_the_dtype_of_hidden(
    kinds: tuple[torch.dtype, torch.dtype], randn: Randn
) -> None:
    hidden, folded, gate, heads = problem("odd", randn)
    hidden, folded = hidden.to(kinds[0]), FoldedIdentity(*(x.to(kinds[1]) for x in folded))
    got = fused_identity_attention(hidden, folded, gate=gate.bfloat16(), heads=heads)
    assert got.dtype == kinds[0]
    want = oracle(hidden, folded, gate.bfloat16(), heads)
    assert_close("mixed", got, want, TOLERANCES["kernel", name_of(kinds[0])])


def test_any_strides(randn: Randn, strided: Callable[[Tensor], Tensor]) -> None:
    hidden, folded, gate, heads = problem("odd", randn)
    want = fused_identity_attention(hidden, folded, gate=gate, heads=heads)
    views = FoldedIdentity(*(strided(x) for x in folded))
    got = fused_identity_attention(strided(hidden), views, gate=gate, heads=heads)
    assert got.is_contiguous()
    # Not bit for bit: the sums of A's columns are PyTorch's, whose order follows the strides.
    assert_close("strided", got, want, TOLERANCES["kernel", "float32"])
    joint = torch.cat((hidden.new_full((2, 3, 33), float("nan")), hidden), dim=1)
    assert torch.equal(fused_identity_attention(joint[:, 3:], folded, gate=gate, heads=heads), want)


def test_a_closed_gate_leaves_every_bit_and_reads_nothing_else(randn: Randn) -> None:
    hidden, folded, gate, heads = problem("odd", randn, gate=0.0)
    poison = FoldedIdentity(*(torch.full_like(x, float("nan")) for x in folded))
    assert torch.equal(fused_identity_attention(hidden, poison, gate=gate, heads=heads), hidden)
    hidden.requires_grad_()
    fused_identity_attention(hidden, poison, gate=gate, heads=heads).backward(torch.ones_like(hidden))
    assert hidden.grad is not None
    assert torch.equal(hidden.grad, torch.ones_like(hidden))


def test_no_tokens(randn: Randn) -> None:
    hidden, folded, gate, heads = problem("odd", randn)
    empty = hidden[:, :0].clone().requires_grad_()
    A = folded.A.clone().requires_grad_()
    got = fused_identity_attention(empty, folded._replace(A=A), gate=gate, heads=heads)
    assert got.shape == empty.shape
    got.sum().backward()
    assert A.grad is not None
    assert not A.grad.any()


@pytest.mark.parametrize("gate", [0.7, 0.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("name", ["odd", "one identity for the batch", "two groups of heads"])
def test_gradients_are_those_of_the_reference(
    name: str, dtype: torch.dtype, gate: float, randn: Randn, strided: Callable[[Tensor], Tensor]
) -> None:
    hidden, folded, opening, heads = problem(name, randn, dtype, gate)
    leaves = [x.clone().requires_grad_() for x in (hidden, *folded, opening)]
    exact = [x.detach().double().cpu().requires_grad_() for x in leaves]
    grad = strided(randn(*hidden.shape, dtype=dtype))
    got = fused_identity_attention(leaves[0], FoldedIdentity(*leaves[1:4]), gate=leaves[4], heads=heads)
    got.backward(grad)
    want = folded_identity_attention(exact[0], FoldedIdentity(*exact[1:4]), gate=exact[4], heads=heads)
    want.backward(grad.double().cpu())
    for which, leaf, wanted in zip(("hidden", "A", "a0", "Bm", "gate"), leaves, exact, strict=True):
        assert leaf.grad is not None
        assert leaf.grad.dtype == leaf.dtype
        assert_close(f"gradient of {which}", leaf.grad, wanted.grad, TOLERANCES["kernel", name_of(dtype)])


def test_gradients_reach_key_value_and_every_weight(randn: Randn) -> None:
    heads, size, width = 2, 8, 24
    named = {
        "norm_weight": 1 + randn(width), "norm_bias": randn(width),
        "query_weight": randn(heads * size, width), "out_weight": randn(width, heads * size),
    }  # fmt: skip
    leaves = [randn(1, 9, width), randn(1, 4, heads * size), randn(1, 4, heads * size), *named.values()]
    gate = torch.tensor(0.3, device=leaves[0].device)
    grads = []
    for backend in ("triton", "reference"):
        mine = [x.clone().requires_grad_() for x in leaves]
        weights: dict[str, Any] = dict(zip(named, mine[3:], strict=True))
        out = fused_identity_attention_unfolded(
            *mine[:3],
            gate=gate,
            heads=heads,
            backend=backend,
            **weights,
        )
        out.square().sum().backward()
        grads.append([x.grad for x in mine])
    for index, (fused, plain) in enumerate(zip(*grads, strict=True)):
        # Both are float32 and go different ways round; the second counts its own rounding too.
        tolerance = TOLERANCES["onnx", "transformer", "fp32"]
        assert_close(f"gradient {index}", fused, plain, tolerance)


def test_only_what_is_asked_for_is_differentiated(randn: Randn) -> None:
    hidden, folded, gate, heads = problem("odd", randn)
    op = torch.ops.proteus_deploy.identity_attention_backward
    grads = op(torch.ones_like(hidden), hidden, *folded, gate, heads, 1e-5, False, False)
    assert grads[0].shape == hidden.shape
    assert [x.numel() for x in grads[1:4]] == [0, 0, 0]


def test_opcheck(randn: Randn) -> None:
    hidden, folded, gate, heads = problem("one token", randn)
    tensors = [x.clone().requires_grad_() for x in (hidden, *folded, gate)]
    torch.library.opcheck(torch.ops.proteus_deploy.identity_attention.default, (*tensors, heads, 1e-5))
    plain = [x.detach() for x in tensors]
    torch.library.opcheck(
        torch.ops.proteus_deploy.identity_attention_backward.default,
        (plain[0], *plain, heads, 1e-5, True, True),
    )


class _Module(torch.nn.Module):
    def forward(self, hidden: Tensor, A: Tensor, a0: Tensor, Bm: Tensor, gate: Tensor) -> Tensor:
        return fused_identity_attention(hidden, FoldedIdentity(A, a0, Bm), gate=gate, heads=2)


def test_export_keeps_the_op_and_one_graph_serves_every_gate(randn: Randn) -> None:
    hidden, folded, gate, heads = problem("one token", randn)
    program = torch.export.export(_Module(), (hidden, *folded, gate))
    assert "proteus_deploy.identity_attention.default" in program.graph_module.code
    for value in (0.7, 0.0, -2.0):
        opening = torch.tensor(value, device=hidden.device)
        got = program.module()(hidden, *folded, opening)
        want = oracle(hidden, folded, opening, heads)
        assert_close(f"gate {value}", got, want, TOLERANCES["kernel", "float32"])


def test_wrong_inputs_are_refused_by_name(randn: Randn) -> None:
    hidden, folded, gate, heads = problem("odd", randn)

    def call(h: Tensor = hidden, f: FoldedIdentity = folded, g: Tensor = gate, n: int = heads) -> None:
        fused_identity_attention(h, f, gate=g, heads=n)

    with pytest.raises(InputError, match=r"hidden is float64; the kernel takes float32, bfloat16"):
        call(h=hidden.double())
    with pytest.raises(InputError, match=r"A has the shape \[2, 32, 15\], expected \[any, 33, any\]"):
        call(f=folded._replace(A=folded.A[:, 1:]))
    with pytest.raises(InputError, match="15 columns, which 4 heads can't share"):
        call(n=4)
    with pytest.raises(InputError, match="gate has 2 values"):
        call(g=gate.expand(2))
    with pytest.raises(InputError, match="2 identities for 1 samples"):
        call(h=hidden[:1])
    wide = FoldedIdentity(randn(1, 33, 2048), randn(1, 1, 2048), randn(1, 2048, 33))
    with pytest.raises(InputError, match="the kernel holds 1024"):
        call(f=wide, n=32)
    with pytest.raises(InputError, match="backend 'fast' is unknown; there are triton, reference"):
        fused_identity_attention(hidden, folded, gate=gate, heads=heads, backend="fast")  # type: ignore[arg-type]


def test_no_silent_fallback(randn: Randn, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, folded, gate, heads = problem("odd", randn)
    cpu = FoldedIdentity(*(x.cpu() for x in folded))
    monkeypatch.setattr(launch, "_is_interpreted", lambda kernel: False)
    with pytest.raises(BackendError, match=r"tensors are on cpu.*backend='reference'.*TRITON_INTERPRET=1"):
        fused_identity_attention(hidden.cpu(), cpu, gate=gate.cpu(), heads=heads)
    want = folded_identity_attention(hidden, folded, gate=gate, heads=heads)
    got = fused_identity_attention(hidden, folded, gate=gate, heads=heads, backend="reference")
    assert torch.equal(got, want)


def test_without_triton_the_error_says_what_to_install(randn: Randn, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, folded, gate, heads = problem("odd", randn)
    for name in [name for name in sys.modules if name.startswith("proteus_deploy.kernels.")]:
        if name.endswith((".triton", ".triton_backward", ".triton_parts")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(BackendError, match=r"pip install 'proteus-deploy\[triton\]'"):
        fused_identity_attention(hidden, folded, gate=gate, heads=heads)


def test_importing_the_kernels_loads_no_triton() -> None:
    code = (
        "import sys, proteus_deploy.kernels.identity_attention, proteus_deploy.kernels.modulated_norm, "
        "proteus_deploy.kernels.qk_norm_rotary, proteus_deploy.kernels.gated_residual_norm; "
        "print('triton' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.parametrize("tokens", [17_550, 1])
def test_published_size(tokens: int, dtype: torch.dtype, randn: Randn) -> None:
    batch, heads, size, queries, width = 2, 16, 128, 32, 3072
    key, value = (randn(1, queries, heads * size, dtype=dtype) for _ in range(2))
    folded = fold_identity_attention(
        key, value, heads=heads,
        norm_weight=1 + 0.1 * randn(width, dtype=dtype), norm_bias=0.1 * randn(width, dtype=dtype),
        query_weight=randn(heads * size, width, dtype=dtype) / width**0.5,
        out_weight=randn(width, heads * size, dtype=dtype) / (heads * size) ** 0.5,
    )  # fmt: skip
    hidden = randn(batch, tokens, width, dtype=dtype)
    gate = torch.tensor(0.7, device=hidden.device)
    got = fused_identity_attention(hidden, folded, gate=gate, heads=heads)
    wide = FoldedIdentity(*(x.float() for x in folded))
    want = folded_identity_attention(hidden.float(), wide, gate=gate, heads=heads)
    assert_close("hidden", got, want, TOLERANCES["kernel", name_of(dtype)])
    with launch.autotune():
        tuned = fused_identity_attention(hidden, folded, gate=gate, heads=heads)
    assert_close("tuned", tuned, want, TOLERANCES["kernel", name_of(dtype)])
