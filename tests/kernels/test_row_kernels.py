"""Modulated norm, and gated residual with the next norm: the kernels are their references."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from proteus_deploy.errors import InputError
from proteus_deploy.kernels.gated_residual_norm import fused_gated_residual_norm, gated_residual_norm
from proteus_deploy.kernels.modulated_norm import fused_modulated_norm, modulated_norm_streams
from proteus_deploy.testing import TOLERANCES, assert_close

Randn = Callable[..., Tensor]
Strided = Callable[[Tensor], Tensor]
Double = Callable[[Any], Any]
SHAPES = {  # batch, text tokens L, video tokens N, width d
    "one token each": (1, 1, 1, 32),
    "odd": (2, 5, 13, 33),
    "no text": (1, 0, 3, 24),
    "no video": (1, 3, 0, 24),
    "one channel": (1, 2, 3, 1),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
STREAMS = ("new text", "new video", "norm")


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def problem(
    name: str, randn: Randn, dtype: torch.dtype = torch.float32, vectors: torch.dtype | None = None
) -> dict[str, Any]:
    """Arguments of the gated residual norm; chunks of one projection, as the model makes them."""
    batch, text, video, width = SHAPES[name]
    kind = vectors or dtype
    names = ("video_shift", "video_scale", "video_gate", "text_shift", "text_scale", "text_gate")
    chunks = randn(batch, 6 * width, dtype=kind).unsqueeze(1).chunk(6, dim=-1)
    return {
        "text": randn(batch, text, width, dtype=dtype),
        "video": randn(batch, video, width, dtype=dtype),
        "update": randn(batch, text + video, width, dtype=dtype),
        "weight": 1 + randn(width, dtype=kind),
        "bias": randn(width, dtype=kind),
        "eps": 1e-5,
        **dict(zip(names, chunks, strict=True)),
    }


def norm_only(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: x for name, x in arguments.items() if name != "update" and not name.endswith("gate")}


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("name", SHAPES)
def test_modulated_norm(name: str, dtype: torch.dtype, randn: Randn, double: Double) -> None:
    arguments = norm_only(problem(name, randn, dtype))
    got = fused_modulated_norm(**arguments)
    assert got.dtype == dtype
    want = modulated_norm_streams(**double(arguments))
    assert_close("norm", got, want, TOLERANCES["kernel", name_of(dtype)])


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("name", SHAPES)
def test_gated_residual_norm(name: str, dtype: torch.dtype, randn: Randn, double: Double) -> None:
    arguments = problem(name, randn, dtype)
    got = fused_gated_residual_norm(**arguments)
    want = gated_residual_norm(**double(arguments))
    for which, mine, wanted in zip(STREAMS, got, want, strict=True):
        assert mine.dtype == dtype
        assert_close(which, mine, wanted, TOLERANCES["kernel", name_of(dtype)])


@pytest.mark.parametrize("kinds", [(torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)])
def test_mixed_dtypes(kinds: tuple[torch.dtype, torch.dtype], randn: Randn, double: Double) -> None:
    arguments = problem("odd", randn, *kinds)
    want = gated_residual_norm(**double(arguments))
    for which, mine, wanted in zip(STREAMS, fused_gated_residual_norm(**arguments), want, strict=True):
        assert mine.dtype == kinds[0]
        assert_close(which, mine, wanted, TOLERANCES["kernel", name_of(kinds[0])])


def test_any_strides_give_the_same_bits(randn: Randn, strided: Strided) -> None:
    arguments = problem("odd", randn)
    views: dict[str, Any] = {
        name: strided(x) if isinstance(x, Tensor) else x for name, x in arguments.items()
    }
    for got, want in zip(
        fused_gated_residual_norm(**views), fused_gated_residual_norm(**arguments), strict=True
    ):
        assert got.is_contiguous()
        assert torch.equal(got, want)
    got = fused_modulated_norm(**norm_only(views))
    assert torch.equal(got, fused_modulated_norm(**norm_only(arguments)))


def test_one_modulation_may_serve_the_batch(randn: Randn) -> None:
    arguments = norm_only(problem("odd", randn))
    shared = {name: x[:1] if name.endswith(("shift", "scale")) else x for name, x in arguments.items()}
    spread = {name: x.expand(2, 1, 33) if x is not arguments[name] else x for name, x in shared.items()}
    assert torch.equal(fused_modulated_norm(**shared), fused_modulated_norm(**spread))


def test_inputs_are_not_written_to(randn: Randn) -> None:
    arguments = problem("odd", randn)
    before = {name: x.clone() for name, x in arguments.items() if isinstance(x, Tensor)}
    fused_gated_residual_norm(**arguments)
    assert all(torch.equal(arguments[name], x) for name, x in before.items())


def test_a_large_mean_cancels(randn: Randn, double: Double) -> None:
    arguments = norm_only(problem("odd", randn))
    arguments["video"] = arguments["video"] + 1000
    want = modulated_norm_streams(**double(arguments))
    assert_close("norm", fused_modulated_norm(**arguments), want, TOLERANCES["bundle", "graph", "fp32"])


def test_the_reference_runs_where_it_is_asked_for(randn: Randn) -> None:
    arguments = problem("odd", randn)
    got = fused_gated_residual_norm(**arguments, backend="reference")
    assert all(map(torch.equal, got, gated_residual_norm(**arguments)))
    plain = fused_modulated_norm(**norm_only(arguments), backend="reference")
    assert torch.equal(plain, modulated_norm_streams(**norm_only(arguments)))


def test_opcheck(randn: Randn) -> None:
    arguments = problem("one token each", randn)
    ops = torch.ops.proteus_deploy
    vectors = ("text_shift", "text_scale", "video_shift", "video_scale", "weight", "bias", "eps")
    streams = [arguments[name] for name in ("text", "video", "update", "text_gate", "video_gate")]
    rest = [arguments[name] for name in vectors]
    torch.library.opcheck(ops.modulated_norm.default, (*streams[:2], *rest))
    torch.library.opcheck(ops.gated_residual_norm.default, (*streams, *rest))


def test_a_gradient_is_refused_and_not_dropped(randn: Randn) -> None:
    arguments = problem("odd", randn)
    arguments["video"].requires_grad_()
    with pytest.raises(RuntimeError, match=r"backward through proteus_deploy\.modulated_norm"):
        fused_modulated_norm(**norm_only(arguments)).sum().backward()
    with pytest.raises(RuntimeError, match=r"backward through proteus_deploy\.gated_residual_norm"):
        fused_gated_residual_norm(**arguments)[1].sum().backward()


def test_wrong_inputs_are_refused_by_name(randn: Randn) -> None:
    arguments = problem("odd", randn)
    with pytest.raises(InputError, match=r"update has the shape \[2, 17, 33\], expected \[2, 18, 33\]"):
        fused_gated_residual_norm(**{**arguments, "update": arguments["update"][:, 1:]})
    arguments = norm_only(arguments)
    with pytest.raises(InputError, match=r"text is torch.bfloat16 and video torch.float32"):
        fused_modulated_norm(**{**arguments, "text": arguments["text"].bfloat16()})
    with pytest.raises(InputError, match=r"text_scale has the shape \[2, 2, 33\], expected \[2, 1, 33\]"):
        fused_modulated_norm(**{**arguments, "text_scale": arguments["text_scale"].expand(2, 2, 33)})
    with pytest.raises(InputError, match=r"weight has the shape \[32\], expected \[33\]"):
        fused_modulated_norm(**{**arguments, "weight": arguments["weight"][1:]})
    wide = {"text": randn(1, 1, 20_000), "video": randn(1, 1, 20_000)}
    with pytest.raises(InputError, match="a token of at most 16384 values"):
        fused_modulated_norm(**{**arguments, **wide})


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
def test_published_size(dtype: torch.dtype, randn: Randn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "published", (2, 226, 17_550, 3072))
    arguments = problem("published", randn, dtype)
    wide: dict[str, Any] = {name: x.float() if isinstance(x, Tensor) else x for name, x in arguments.items()}
    want = gated_residual_norm(**wide)
    for which, mine, wanted in zip(STREAMS, fused_gated_residual_norm(**arguments), want, strict=True):
        assert_close(which, mine, wanted, TOLERANCES["kernel", name_of(dtype)])
    got = fused_modulated_norm(**norm_only(arguments))
    assert_close("norm", got, modulated_norm_streams(**norm_only(wide)), TOLERANCES["kernel", name_of(dtype)])
