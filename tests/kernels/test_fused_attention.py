"""The fused attention is its reference; its 8-bit forms are theirs, and as near as their steps allow."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from proteus_deploy.errors import BackendError, InputError
from proteus_deploy.kernels.joint_attention import (
    Product,
    attention,
    fused_attention,
    quantised,
    quantised_attention,
)
from proteus_deploy.kernels.joint_attention.quantised import KEY_GROUP, QUERY_GROUP, quantise_pair
from proteus_deploy.testing import TOLERANCES, Tolerance, assert_close, relative_error

Randn = Callable[..., Tensor]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
QUANTISED: tuple[Product, ...] = ("int8", "fp8")
PRODUCTS: tuple[Product, ...] = ("tokens", *QUANTISED)
# One token, and one off the blocks: of 16 queries and 32 keys in float32, 128 and 64 in 16 bits.
TOKENS = [(tokens, torch.float32) for tokens in (1, 15, 16, 17, 31, 32, 33)]
TOKENS += [(tokens, dtype) for dtype in DTYPES[1:] for tokens in (1, 63, 64, 65, 127, 129)]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def heads(
    randn: Randn, tokens: int, size: int = 64, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key, value [2, 3, S, D] as the model has them: split from projections, so over [B, S, H, D]."""
    query, key, value = (randn(2, tokens, 3, size, dtype=dtype).transpose(1, 2) for _ in range(3))
    return query, key, value


def exact(*tensors: Tensor) -> Tensor:
    return attention(*(x.double().cpu() for x in tensors))


@pytest.mark.parametrize(("tokens", "dtype"), TOKENS)
def test_is_the_reference(tokens: int, dtype: torch.dtype, randn: Randn) -> None:
    given = heads(randn, tokens, dtype=dtype)
    got = fused_attention(*given)
    assert got.dtype == dtype
    assert_close("attention", got, exact(*given), TOLERANCES["kernel", name_of(dtype)])


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("size", [32, 128])
def test_other_head_sizes(size: int, product: Product, randn: Randn) -> None:
    given = heads(randn, 37, size)
    want = exact(*given) if product == "tokens" else quantised_attention(*given, product)
    assert_close("attention", fused_attention(*given, product=product), want, TOLERANCES["kernel", "float32"])


@pytest.mark.parametrize("product", QUANTISED)
@pytest.mark.parametrize("tokens", [1, QUERY_GROUP, 33, KEY_GROUP, KEY_GROUP + 1])
def test_8_bits_are_the_plain_form(tokens: int, product: Product, randn: Randn) -> None:
    given = heads(randn, tokens)
    got = fused_attention(*given, product=product)
    assert_close("attention", got, quantised_attention(*given, product), TOLERANCES["kernel", "float32"])


@pytest.mark.parametrize("product", QUANTISED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
def test_8_bits_of_16_bit_tokens(dtype: torch.dtype, product: Product, randn: Randn) -> None:
    given = heads(randn, 150, dtype=dtype)
    got = fused_attention(*given, product=product)
    assert got.dtype == dtype
    # The same codes, which are taken in float32, and exact weights and values.
    query, key, value = (x.double() for x in given)
    want = quantised_attention(query, key, value, product)
    assert_close("attention", got, want, TOLERANCES["kernel", name_of(dtype)])


@pytest.mark.parametrize("product", QUANTISED)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_codes_and_steps_are_the_plain_ones(dtype: torch.dtype, product: Product, randn: Randn) -> None:
    """Bit for bit on a CPU: odd ends, an outlier, a group of zeros, one of numbers too small for a step."""
    from proteus_deploy.kernels.joint_attention import triton_quantised

    query, key, _ = heads(randn, 77, dtype=dtype)
    query[0, 0, 3, 5], query[0, 1, :QUERY_GROUP], query[0, 2, :QUERY_GROUP] = 3e4, 0, 1e-37
    got = triton_quantised.quantise(query, key, product)
    for name, mine, wanted in zip(got._fields, got, quantise_pair(query, key, product), strict=True):
        assert mine.shape == wanted.shape
        assert mine.dtype == wanted.dtype
        if mine.device.type == "cpu":
            assert torch.equal(mine.float(), wanted.float()), name


def test_int8_steps_use_all_codes(randn: Randn) -> None:
    """The largest of a group has the code 127: steps of the wrong group would clip it or waste codes."""
    query, key, _ = heads(randn, KEY_GROUP + 5)
    pair = quantise_pair(query * torch.arange(1, KEY_GROUP + 6)[:, None].to(query), key, "int8")
    for codes, group in ((pair.query, QUERY_GROUP), (pair.key, KEY_GROUP)):
        for part in codes.int().abs().split(group, dim=2):
            assert (part.amax((2, 3)) == 127).all()


def largest_change(query: Tensor, key: Tensor, value: Tensor, product: Product) -> Tensor:
    """How far rounding can move each result: weights change by e^(2 max|Δ score|) at most, in float64."""
    pair = quantise_pair(query, key, product)
    query, key, value = query.double(), (key.float() - quantised.key_mean(key)).double(), value.double()
    factor = quantised.query_factor(query.shape[-1])

    def off(x: Tensor, step: Tensor, group: int) -> Tensor:
        steps = step.double().repeat_interleave(group, dim=2)[:, :, : x.shape[2], None]
        # Half a step; in e4m3 half of the last of three bits, or of the smallest number.
        return steps / 2 if product == "int8" else (x.abs() / 16).maximum(steps / 1024)

    query_off = off(query, pair.query_step / factor, QUERY_GROUP).expand_as(query)
    key_off = off(key, pair.key_step, KEY_GROUP).expand_as(key)
    moved = query_off @ key.abs().mT + (query.abs() + query_off) @ key_off.mT
    most = moved.amax(-1, keepdim=True) / math.sqrt(query.shape[-1])
    weights = torch.softmax(query @ key.mT / math.sqrt(query.shape[-1]), dim=-1)
    return torch.expm1(2 * most) * (weights @ value.abs())


@pytest.mark.parametrize("product", QUANTISED)
def test_8_bits_are_as_near_as_their_steps_allow(product: Product, randn: Randn) -> None:
    given = heads(randn, 150)
    got = fused_attention(*given, product=product).double()
    want = exact(*given)
    assert ((got.cpu() - want).abs() <= largest_change(*given, product).cpu() + 1e-6).all()
    assert_close("attention", got, want, TOLERANCES["attention", product])


def test_an_offset_of_the_keys_costs_int8_nothing(randn: Randn, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys share a large vector, another one in each sample and head: the mean over tokens takes it away."""
    query, key, value = heads(randn, 150)
    shifted = key + 30 * randn(2, 3, 1, 64)
    want = exact(query, shifted, value)
    got = fused_attention(query, shifted, value, product="int8")
    assert_close("with the mean taken away", got, want, TOLERANCES["attention", "int8"])
    monkeypatch.setattr(quantised, "key_mean", lambda key: torch.zeros_like(key[:, :, :1]).float())
    plain = quantised_attention(query, shifted, value, "int8")
    assert relative_error(plain, want) > 10 * relative_error(got, want)


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("sign", [1, -1])
def test_large_scores_overflow_nowhere(sign: int, product: Product, randn: Randn) -> None:
    """Scores of ±10,000 in float32 are 2^-10 off; a row of -10,000 alone has weights like any other."""
    query, key, value = heads(randn, 70)
    query, key = sign * (100 + query), 12 + key
    got = fused_attention(query, key, value, product=product)
    assert got.isfinite().all()
    if product == "tokens":
        bound = Tolerance(
            1e-2, "relative", "2^-10, the sum of 64 products' roundings at 10,000, on each weight"
        )
        assert_close("attention", got, exact(query, key, value), bound)
    else:
        want = quantised_attention(query, key, value, product)
        assert_close("attention", got, want, Tolerance(1e-3, "relative", "the same scores, 2^-10 off"))


@pytest.mark.parametrize("product", PRODUCTS)
def test_any_strides_give_the_same_bits(
    product: Product, randn: Randn, strided: Callable[[Tensor], Tensor]
) -> None:
    query, key, value = heads(randn, 37)
    want = fused_attention(query, key, value, product=product)
    views = fused_attention(*map(strided, (query, key, value)), product=product)
    assert torch.equal(views, want)
    value = value.mT.contiguous().mT
    assert torch.equal(fused_attention(query.contiguous(), key, value, product=product), want)


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_what_lies_behind_the_last_token_is_not_read(
    dtype: torch.dtype, product: Product, randn: Randn
) -> None:
    given = heads(randn, 70, dtype=dtype)
    longer = [torch.full((2, 3, 200, 64), float("nan"), dtype=dtype, device=x.device) for x in given]
    for full, x in zip(longer, given, strict=True):
        full[:, :, :70] = x
    got = fused_attention(*(full[:, :, :70] for full in longer), product=product)
    assert torch.equal(got, fused_attention(*given, product=product))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("product", QUANTISED)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_number_without_a_code_is_not_lost(bad: float, product: Product, randn: Randn) -> None:
    query, key, value = heads(randn, 40)
    query[1, 2, QUERY_GROUP, 7] = bad
    got = fused_attention(query, key, value, product=product).isnan()
    assert got[1, 2, QUERY_GROUP : 2 * QUERY_GROUP].all()
    assert got.sum() == QUERY_GROUP * 64
    query[1, 2, QUERY_GROUP, 7], key[0, 1, 39, 0] = 0, bad
    got = fused_attention(query, key, value, product=product).isnan()
    assert got[0, 1].all()
    assert got.sum() == got[0, 1].numel()


def test_results_lie_as_the_output_projection_wants_them(randn: Randn) -> None:
    for given in (heads(randn, 5), [x.contiguous() for x in heads(randn, 5)]):
        assert fused_attention(*given).transpose(1, 2).is_contiguous()


def test_nothing_gives_nothing(randn: Randn) -> None:
    for product in PRODUCTS:
        assert fused_attention(*heads(randn, 0), product=product).shape == (2, 3, 0, 64)


def test_the_plain_forms_run_where_they_are_asked_for(randn: Randn) -> None:
    given = heads(randn, 9)
    assert torch.equal(fused_attention(*given, backend="reference"), attention(*given))
    got = fused_attention(*given, product="int8", backend="reference")
    assert torch.equal(got, quantised_attention(*given, "int8"))


@pytest.mark.parametrize("product", PRODUCTS)
def test_opcheck(product: Product, randn: Randn) -> None:
    op = torch.ops.proteus_deploy.joint_attention.default
    torch.library.opcheck(op, (*heads(randn, 5), product))


def test_compiled_and_exported_graphs_keep_it(randn: Randn) -> None:
    class Attend(nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return fused_attention(query, key, value, product="int8") * 2

    given = heads(randn, 9)
    want = 2 * fused_attention(*given, product="int8")
    assert torch.equal(torch.compile(Attend(), backend="aot_eager", fullgraph=True)(*given), want)
    program = torch.export.export(Attend(), given)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets[0] == "proteus_deploy.joint_attention.default"
    assert torch.equal(program.module()(*given), want)


def test_a_gradient_is_refused_and_not_dropped(randn: Randn) -> None:
    query, key, value = heads(randn, 5)
    key.requires_grad_()
    with pytest.raises(InputError, match=r"a gradient is asked for.*run it under torch\.no_grad\(\)"):
        fused_attention(query, key, value)
    with torch.no_grad():
        fused_attention(query, key, value)
    with pytest.raises(RuntimeError, match=r"backward through proteus_deploy\.joint_attention"):
        torch.ops.proteus_deploy.joint_attention(query, key, value, "tokens").sum().backward()


def test_wrong_inputs_are_refused_by_name(randn: Randn) -> None:
    query, key, value = heads(randn, 5)
    with pytest.raises(
        InputError, match=r"the head size is 16; the kernel takes 32, 64 or 128\. Use PyTorch's"
    ):
        fused_attention(*heads(randn, 5, 16))
    with pytest.raises(InputError, match=r"key has the shape \[2, 3, 4, 64\], expected \[2, 3, 5, 64\]"):
        fused_attention(query, key[:, :, 1:], value)
    with pytest.raises(InputError, match=r"value has the shape \[2, 2, 5, 64\], expected \[2, 3, 5, 64\]"):
        fused_attention(query, key, value[:, 1:])
    with pytest.raises(InputError, match=r"value torch\.bfloat16; convert them to one dtype"):
        fused_attention(query, key, value.bfloat16())
    with pytest.raises(InputError, match="query is float64; the kernel takes float32, bfloat16, float16"):
        fused_attention(*(x.double() for x in (query, key, value)))
    with pytest.raises(InputError, match="product 'int4' is unknown; there are tokens, int8, fp8"):
        fused_attention(query, key, value, product="int4")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="backend 'cuda' is unknown; there are triton, reference"):
        fused_attention(query, key, value, backend="cuda")  # type: ignore[arg-type]


@pytest.mark.parametrize(("capability", "runs"), [((8, 0), False), ((8, 9), True), ((9, 0), True)])
def test_fp8_says_what_it_needs(
    capability: tuple[int, int], runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from proteus_deploy.kernels.joint_attention.triton import check_device

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    check_device(torch.device("cuda"), "int8")
    if runs:
        check_device(torch.device("cuda"), "fp8")
        return
    with pytest.raises(
        BackendError, match=r"as sm_89, sm_90 and newer have, and the device is sm_80; take 'int8'"
    ):
        check_device(torch.device("cuda"), "fp8")


@pytest.mark.gpu
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
def test_published_size(dtype: torch.dtype, product: Product, randn: Randn) -> None:
    """One of the batch's two samples and eight of its 48 heads: those are alike, the tokens are all there."""
    query, key, value = (randn(1, 17_776, 8, 64, dtype=dtype).transpose(1, 2) for _ in range(3))
    got = fused_attention(query, key, value, product=product)
    kind = ("kernel", name_of(dtype)) if product == "tokens" else ("attention", product)
    want = attention(query.float(), key.float(), value.float())
    assert_close("attention", got, want, TOLERANCES[kind])


@pytest.mark.gpu
@pytest.mark.parametrize("product", QUANTISED)
def test_codes_on_a_device(product: Product, randn: Randn) -> None:
    """A device may fuse a product and a sum, so that a tie falls to the other side: in a few codes of all."""
    from proteus_deploy.kernels.joint_attention import triton_quantised

    query, key, _ = heads(randn, 1000, dtype=torch.bfloat16)
    got = triton_quantised.quantise(query, key, product)
    for mine, wanted in zip(got, quantise_pair(query, key, product), strict=True):
        assert (mine.float() != wanted.float()).float().mean() < 1e-3
        assert_close(
            "codes", mine.float(), wanted.float(), Tolerance(1e-3, "relative", "few codes, one apart")
        )
