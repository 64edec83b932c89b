"""The fused norm and rotary embedding of queries and keys is its reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from proteus_deploy.errors import InputError
from proteus_deploy.kernels.joint_attention import rotate
from proteus_deploy.kernels.qk_norm_rotary import fused_qk_norm_rotary, qk_norm_rotary
from proteus_deploy.testing import TOLERANCES, assert_close

Randn = Callable[..., Tensor]
SHAPES = {  # batch, text tokens, video tokens, heads H, head size D
    "one token": (1, 0, 1, 1, 2),
    "odd": (2, 3, 10, 3, 6),
    "head size 64": (1, 2, 7, 18, 64),
    "text alone": (1, 5, 0, 2, 16),
    "one pair more than a power of two": (1, 1, 5, 5, 34),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def problem(
    name: str, randn: Randn, dtype: torch.dtype = torch.float32, affine: torch.dtype | None = None
) -> dict[str, Any]:
    """Heads split from projections, as the model makes them, so [B, H, S, D] over memory [B, S, H, D]."""
    batch, text, video, heads, size = SHAPES[name]
    kind = affine or dtype
    angles = (randn(video, size // 2) * 3).repeat_interleave(2, dim=-1)
    query, key = (
        randn(batch, text + video, heads * size, dtype=dtype).unflatten(-1, (heads, size)).transpose(1, 2)
        for _ in range(2)
    )
    return {
        "query": query, "key": key,
        "query_weight": 1 + randn(size, dtype=kind), "query_bias": randn(size, dtype=kind),
        "key_weight": 1 + randn(size, dtype=kind), "key_bias": randn(size, dtype=kind),
        "cos": angles.cos(), "sin": angles.sin(), "eps": 1e-6,
    }  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("name", SHAPES)
def test_both_are_the_reference(
    name: str, dtype: torch.dtype, randn: Randn, double: Callable[[Any], Any]
) -> None:
    arguments = problem(name, randn, dtype)
    got = fused_qk_norm_rotary(**arguments)
    want = qk_norm_rotary(**double(arguments))
    for which, mine, wanted in zip(("query", "key"), got, want, strict=True):
        assert mine.dtype == dtype
        assert_close(which, mine, wanted, TOLERANCES["kernel", name_of(dtype)])


def test_the_reference_is_norm_then_rotation_of_the_padded_tables(randn: Randn) -> None:
    """Text isn't turned: tables padded with no angle, as the model pads them, give the same."""
    arguments = problem("odd", randn)
    cos = torch.cat((arguments["cos"].new_ones(3, 6), arguments["cos"]))
    sin = torch.cat((arguments["sin"].new_zeros(3, 6), arguments["sin"]))
    norm = torch.nn.functional.layer_norm
    want = rotate(
        norm(arguments["query"], (6,), arguments["query_weight"], arguments["query_bias"], 1e-6), cos, sin
    )
    assert torch.equal(qk_norm_rotary(**arguments)[0], want)
    padded = fused_qk_norm_rotary(**{**arguments, "cos": cos, "sin": sin})
    assert all(map(torch.equal, padded, fused_qk_norm_rotary(**arguments)))


def test_mixed_dtypes(randn: Randn, double: Callable[[Any], Any]) -> None:
    arguments = problem("odd", randn, torch.bfloat16, torch.float32)
    arguments |= {"cos": arguments["cos"].half(), "sin": arguments["sin"].half()}
    got = fused_qk_norm_rotary(**arguments)
    for which, mine, wanted in zip(("query", "key"), got, qk_norm_rotary(**double(arguments)), strict=True):
        assert mine.dtype == torch.bfloat16
        assert_close(which, mine, wanted, TOLERANCES["kernel", "bfloat16"])


def test_any_strides_give_the_same_bits(randn: Randn, strided: Callable[[Tensor], Tensor]) -> None:
    arguments = problem("odd", randn)
    want = fused_qk_norm_rotary(**arguments)
    views: dict[str, Any] = {
        name: strided(x) if isinstance(x, Tensor) else x for name, x in arguments.items()
    }
    assert all(map(torch.equal, fused_qk_norm_rotary(**views), want))
    packed = {**arguments, "query": arguments["query"].contiguous()}
    assert all(map(torch.equal, fused_qk_norm_rotary(**packed), want))


def test_results_lie_as_the_output_projection_wants_them(randn: Randn) -> None:
    query, key = fused_qk_norm_rotary(**problem("odd", randn))
    assert query.transpose(1, 2).is_contiguous()
    assert key.transpose(1, 2).is_contiguous()


def test_the_reference_runs_where_it_is_asked_for(randn: Randn) -> None:
    arguments = problem("odd", randn)
    got = fused_qk_norm_rotary(**arguments, backend="reference")
    assert all(map(torch.equal, got, qk_norm_rotary(**arguments)))


def test_opcheck(randn: Randn) -> None:
    op = torch.ops.proteus_deploy.qk_norm_rotary.default
    torch.library.opcheck(op, tuple(problem("odd", randn).values()))


def test_a_gradient_is_refused_and_not_dropped(randn: Randn) -> None:
    arguments = problem("odd", randn)
    arguments["query"].requires_grad_()
    with pytest.raises(RuntimeError, match=r"backward through proteus_deploy\.qk_norm_rotary"):
        fused_qk_norm_rotary(**arguments)[0].sum().backward()


def test_wrong_inputs_are_refused_by_name(randn: Randn) -> None:
    arguments = problem("odd", randn)
    with pytest.raises(InputError, match="the head size is 5; pairs need an even one"):
        fused_qk_norm_rotary(**{**arguments, "query": randn(1, 1, 4, 5), "key": randn(1, 1, 4, 5)})
    with pytest.raises(InputError, match=r"key has the shape \[2, 3, 12, 6\], expected \[2, 3, 13, 6\]"):
        fused_qk_norm_rotary(**{**arguments, "key": arguments["key"][:, :, 1:]})
    long = randn(14, 6)
    with pytest.raises(InputError, match="the tables have 14 tokens and the query 13"):
        fused_qk_norm_rotary(**{**arguments, "cos": long, "sin": long})
    with pytest.raises(InputError, match=r"sin has the shape \[9, 6\], expected \[10, 6\]"):
        fused_qk_norm_rotary(**{**arguments, "sin": arguments["sin"][1:]})


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
def test_published_size(dtype: torch.dtype, randn: Randn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "published", (2, 226, 17_550, 48, 64))
    arguments = problem("published", randn, dtype)
    wide: dict[str, Any] = {name: x.float() if isinstance(x, Tensor) else x for name, x in arguments.items()}
    for which, mine, wanted in zip(
        ("query", "key"), fused_qk_norm_rotary(**arguments), qk_norm_rotary(**wide), strict=True
    ):
        assert_close(which, mine, wanted, TOLERANCES["kernel", name_of(dtype)])
