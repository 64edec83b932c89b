"""Attention of one query over a cache is its reference; the products beside it give ADSA's redundancy."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from proteus_deploy.errors import InputError
from proteus_deploy.kernels.decode_attention import decode_attention, fused_decode_attention
from proteus_deploy.testing import TOLERANCES, assert_close

Randn = Callable[..., Tensor]
SHAPES = {  # sequences, query heads H, heads of keys and values G, slots S, head size D, length
    "one slot": (1, 1, 1, 1, 64, 1),
    "one of many slots": (2, 3, 3, 70, 16, 1),
    "whole blocks": (1, 2, 2, 128, 64, 128),
    "one more than blocks, in splits": (2, 1, 1, 150, 64, 129),
    "one less than a block": (1, 1, 1, 80, 64, 63),
    "two queries share keys": (1, 4, 2, 70, 64, 66),
    "all queries share keys": (2, 5, 1, 131, 32, 130),
    "more queries than a tile's least": (1, 17, 1, 20, 16, 18),
    "odd head size": (2, 3, 3, 140, 7, 139),
    "odd head size, shared": (1, 6, 2, 40, 7, 33),
    "one number a head": (1, 2, 1, 9, 1, 5),
    "head size 160": (1, 2, 2, 35, 160, 33),
}
DTYPES = [torch.bfloat16, torch.float16]
IN_16_BITS = [
    "one slot", "one more than blocks, in splits", "two queries share keys",
    "more queries than a tile's least", "odd head size", "odd head size, shared",
]  # fmt: skip
CASES = [(name, torch.float32) for name in SHAPES] + list(itertools.product(IN_16_BITS, DTYPES))


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def problem(
    name: str, randn: Randn, dtype: torch.dtype = torch.float32, *, lengths: bool = False
) -> dict[str, Any]:
    """Slots behind the length are NaN. lengths: the length as a tensor, one less in the last sequence."""
    batch, heads, groups, slots, size, length = SHAPES[name]
    keys, values = (randn(batch, groups, slots, size, dtype=dtype) for _ in range(2))
    keys[:, :, length:], values[:, :, length:] = torch.nan, torch.nan
    given: dict[str, Any] = {
        "query": randn(batch, heads, size, dtype=dtype), "keys": keys, "values": values, "length": length,
        "direction": randn(batch, groups, size) * 3,
    }  # fmt: skip
    if lengths:
        given["length"] = torch.tensor([length] * (batch - 1) + [length - 1], dtype=torch.int32).to(
            keys.device
        )
    return given


def attend(given: dict[str, Any], **options: Any) -> tuple[Tensor, Tensor]:
    """The fused op with a direction, so with products."""
    out, similarity = fused_decode_attention(**given, **options)
    assert similarity is not None
    return out, similarity


def exact(given: dict[str, Any], **options: Any) -> tuple[Tensor, Tensor | None]:
    wide: dict[str, Any] = {name: x.cpu() if isinstance(x, Tensor) else x for name, x in given.items()}
    for name in ("query", "keys", "values", "direction"):
        wide[name] = wide[name].double()
    return decode_attention(**wide, **options)


def assert_is_the_reference(given: dict[str, Any], **options: Any) -> None:
    out, similarity = attend(given, **options)
    want, similar = exact(given, **options)
    dtype = given["query"].dtype
    assert out.dtype == dtype
    assert_close("attended", out, want, TOLERANCES["kernel", name_of(dtype)])
    assert similarity.dtype == torch.float32
    # Numbers of 16 bits are exact in float32, where their products are summed.
    assert_close("similarity", similarity, similar, TOLERANCES["kernel", "float32"])


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_is_the_reference(name: str, dtype: torch.dtype, randn: Randn) -> None:
    assert_is_the_reference(problem(name, randn, dtype))


@pytest.mark.parametrize(
    "name", ["one more than blocks, in splits", "odd head size", "all queries share keys"]
)
def test_lengths_and_a_mask_for_each_sequence(name: str, randn: Randn) -> None:
    given = problem(name, randn, lengths=True)
    given["mask"] = randn(given["keys"].shape[0], given["keys"].shape[2]) > 0
    assert_is_the_reference(given)


def test_the_reference_is_pytorchs_attention_over_the_slice(randn: Randn) -> None:
    given = problem("odd head size, shared", randn)
    query, keys, values = (given[name].double() for name in ("query", "keys", "values"))
    mask = randn(1, 40) > 0
    want = functional.scaled_dot_product_attention(
        query[:, :, None],
        keys[:, :, :33],
        values[:, :, :33],
        attn_mask=mask[:, None, None, :33],
        scale=0.3,
        enable_gqa=True,
    )
    got, nothing = decode_attention(query, keys, values, 33, None, mask, 0.3)
    assert nothing is None
    assert_close("attended", got, want[:, :, 0], TOLERANCES["kernel", "float64"])
    assert_close(
        "attended", exact({**given, "mask": mask, "scale": 0.3})[0], got, TOLERANCES["kernel", "float64"]
    )


@pytest.mark.parametrize("name", ["one more than blocks, in splits", "odd head size, shared"])
def test_a_scale_and_products_by_head(name: str, randn: Randn) -> None:
    given = problem(name, randn, lengths=True)
    assert_is_the_reference({**given, "scale": -0.7}, per_head=True)


def test_products_by_head_add_up(randn: Randn) -> None:
    given = problem("odd head size, shared", randn)
    _, by_head = attend(given, per_head=True)
    _, similarity = attend(given)
    assert by_head.shape == (1, 2, 40)
    assert torch.equal(by_head[:, 0] + by_head[:, 1], similarity)
    assert not by_head[:, :, 33:].any()


def test_similarity_gives_the_mean_cosine_with_the_others(randn: Randn) -> None:
    """Of 9 slots in use, all of which are in the sum; cosines pair by pair, over both heads side by side."""
    batch, groups, slots, size, length = 2, 2, 11, 5, 9
    keys, values = randn(batch, groups, slots, size), randn(batch, groups, slots, size)
    long = values.transpose(1, 2).flatten(2).double()  # [B, S, G D]
    unit = long / long.norm(dim=-1, keepdim=True)
    direction = unit[:, :length].sum(dim=1).unflatten(-1, (groups, size)).float()
    _, similarity = fused_decode_attention(randn(batch, groups, size), keys, values, length, direction)
    assert similarity is not None
    got = (similarity[:, :length].double() / long[:, :length].norm(dim=-1) - 1) / (length - 1)
    want = torch.zeros(batch, length, dtype=torch.float64)
    for sample, one, other in itertools.product(range(batch), range(length), range(length)):
        if one != other:
            cosine = functional.cosine_similarity(long[sample, one], long[sample, other], dim=0)
            want[sample, one] += cosine.cpu() / (length - 1)
    assert_close("redundancy", got, want, TOLERANCES["kernel", "float32"])


def test_without_a_direction_attention_is_the_same(randn: Randn) -> None:
    given = problem("one more than blocks, in splits", randn)
    want, _ = fused_decode_attention(**given)
    got, similarity = fused_decode_attention(**{**given, "direction": None})
    assert similarity is None
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_a_direction_of_another_dtype(dtype: torch.dtype, randn: Randn) -> None:
    given = problem("odd head size", randn)
    assert_is_the_reference({**given, "direction": given["direction"].to(dtype)})


@pytest.mark.parametrize("name", ["one more than blocks, in splits", "two queries share keys"])
def test_a_query_that_sees_no_slot_gets_zeros(name: str, randn: Randn) -> None:
    """By its mask or by its length; the products stay those of the slots in use."""
    given = problem(name, randn)
    batch, slots = given["keys"].shape[0], given["keys"].shape[2]
    mask = torch.ones(batch, slots, dtype=torch.bool, device=given["keys"].device)
    mask[0] = False
    assert_is_the_reference({**given, "mask": mask})
    out, similarity = attend({**given, "mask": mask})
    assert not out[0].any()
    assert out[1:].all()
    assert similarity[0, : given["length"]].all()
    for length in (0, torch.zeros(batch, dtype=torch.int32, device=mask.device)):
        out, similarity = attend({**given, "length": length})
        assert not out.any()
        assert not similarity.any()


def test_a_mask_that_hides_whole_splits(randn: Randn) -> None:
    given = problem("one more than blocks, in splits", randn)
    mask = torch.zeros(2, 150, dtype=torch.bool, device=given["keys"].device)
    mask[0, 128], mask[1, 3] = True, True
    out, _ = fused_decode_attention(**given, mask=mask)
    assert torch.equal(out[0], given["values"][0, :, 128])
    assert torch.equal(out[1], given["values"][1, :, 3])


def test_lengths_off_the_cache_are_its_ends(randn: Randn) -> None:
    given = problem("whole blocks", randn)
    for asked, want in ((128, 128), (129, 128), (-1, 0)):
        lengths = torch.tensor([asked], dtype=torch.int32, device=given["keys"].device)
        got = attend({**given, "length": lengths})
        assert all(map(torch.equal, got, attend({**given, "length": want})))


@pytest.mark.parametrize("lengths", [False, True], ids=["a number", "a tensor"])
def test_any_strides_give_the_same_bits(
    lengths: bool, randn: Randn, strided: Callable[[Tensor], Tensor]
) -> None:
    given = problem("odd head size, shared", randn, lengths=lengths)
    given["mask"] = randn(1, 40) > 0
    want = attend(given)
    views: dict[str, Any] = {name: strided(given[name]) for name in ("query", "keys", "values", "direction")}
    wider = ~given["mask"].repeat_interleave(2, dim=1)
    views |= {"mask": wider[:, ::2].copy_(given["mask"]), "length": given["length"]}
    assert all(map(torch.equal, attend(views), want))


def test_slices_of_a_longer_buffer_are_taken_as_they_are(randn: Randn) -> None:
    """A layer's part of a cache for all layers, over [layers B, G, longest, D]; and over [B, S, G, D]."""
    given = problem("two queries share keys", randn)
    want, _ = fused_decode_attention(**given)
    buffer = torch.full((3, 2, 200, 64), torch.nan, device=want.device)
    layer = buffer[1:2, :, :70]
    views = {**given, "keys": layer.copy_(given["keys"]), "values": given["values"].mT.contiguous().mT}
    assert torch.equal(fused_decode_attention(**views)[0], want)
    turned = given["keys"].transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(fused_decode_attention(**{**given, "keys": turned})[0], want)


@pytest.mark.parametrize("name", ["one more than blocks, in splits", "two queries share keys"])
@pytest.mark.parametrize("sign", [1, -1])
def test_large_scores_overflow_nowhere(sign: int, name: str, randn: Randn) -> None:
    """Equal keys have equal weights, at scores of 10,000 as at others; -10,000 alone is like any other."""
    given = problem(name, randn)
    length = given["length"]
    given["keys"][:, :, :length] = 12
    query = torch.full_like(given["query"], 100.0 * sign)
    out, _ = fused_decode_attention(**{**given, "query": query})
    mean = given["values"][:, :, :length].double().mean(dim=2)
    want = mean.repeat_interleave(query.shape[1] // mean.shape[1], dim=1)
    assert_close("attended", out, want, TOLERANCES["kernel", "float32"])


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")
@pytest.mark.parametrize("name", ["one more than blocks, in splits", "two queries share keys"])
def test_nan_is_not_lost(name: str, randn: Randn) -> None:
    given = problem(name, randn)
    given["query"][0, 0, 3] = torch.nan
    out, similarity = attend(given)
    assert out[0, 0].isnan().all()
    assert out.isnan().sum() == out[0, 0].numel()
    assert similarity.isfinite().all()


def test_nothing_gives_nothing(randn: Randn) -> None:
    given: dict[str, Any] = {
        "query": randn(2, 3, 8), "keys": randn(2, 3, 0, 8), "values": randn(2, 3, 0, 8), "length": 0,
        "direction": randn(2, 3, 8),
    }  # fmt: skip
    out, similarity = attend(given)
    assert not out.any()
    assert similarity.shape == (2, 0)
    no_sequence = {name: x[:0] if isinstance(x, Tensor) else x for name, x in given.items()}
    out, similarity = attend(no_sequence)
    assert out.shape == (0, 3, 8)
    assert similarity.shape == (0, 0)


def test_equal_shapes_are_split_alike() -> None:
    from proteus_deploy.kernels.decode_attention.triton import splits_for

    assert splits_for(1, 1) == splits_for(1, 0) == splits_for(1, 64) == 1
    assert splits_for(40, 632) == 10
    assert splits_for(1280, 632) == 1
    assert splits_for(1, 10**6) == 32


def test_the_reference_runs_where_it_is_asked_for(randn: Randn) -> None:
    given = problem("odd head size, shared", randn, lengths=True)
    out, similarity = attend(given, backend="reference")
    want, similar = decode_attention(**given)
    assert torch.equal(out, want)
    assert similar is not None
    assert torch.equal(similarity, similar)


@pytest.mark.parametrize("lengths", [False, True], ids=["a number", "a tensor"])
def test_opcheck(lengths: bool, randn: Randn) -> None:
    given = problem("odd head size, shared", randn, lengths=lengths)
    tensors = (given["query"], given["keys"].nan_to_num(), given["values"].nan_to_num())
    op = torch.ops.proteus_deploy.decode_attention.default
    if lengths:
        mask = randn(1, 40) > 0
        torch.library.opcheck(op, (*tensors, given["length"], 40, given["direction"], mask, 0.4, True))
        torch.library.opcheck(op, (*tensors, given["length"], 40, given["direction"], None, 0.4, False))
    else:
        torch.library.opcheck(op, (*tensors, None, 33, None, None, 0.4, False))


def test_compiled_and_exported_graphs_keep_it(randn: Randn) -> None:
    class Attend(nn.Module):
        def forward(
            self, query: Tensor, keys: Tensor, values: Tensor, length: Tensor, direction: Tensor
        ) -> Tensor:
            out, similarity = fused_decode_attention(query, keys, values, length, direction)
            assert similarity is not None
            return out.sum() + similarity

    given = tuple(problem("odd head size, shared", randn, lengths=True).values())
    want = Attend()(*given)
    assert torch.equal(torch.compile(Attend(), backend="aot_eager", fullgraph=True)(*given), want)
    program = torch.export.export(Attend(), given)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets[0] == "proteus_deploy.decode_attention.default"
    assert torch.equal(program.module()(*given), want)


def test_one_compiled_graph_serves_growing_lengths(randn: Randn) -> None:
    """A number that changes at every step is taken as one that changes, not compiled in again and again."""
    given = problem("whole blocks", randn)
    query, keys, values = (given[name] for name in ("query", "keys", "values"))
    counter = torch._dynamo.testing.CompileCounter()
    step = torch.compile(
        lambda length: fused_decode_attention(query, keys, values, length)[0], backend=counter, fullgraph=True
    )
    for length in (5, 6, 7, 40):
        assert torch.equal(step(length), fused_decode_attention(query, keys, values, length)[0])
    assert counter.frame_count == 2


def test_a_gradient_is_refused_and_not_dropped(randn: Randn) -> None:
    given = problem("odd head size, shared", randn)
    given["values"].requires_grad_()
    with pytest.raises(InputError, match=r"a gradient is asked for.*run it under torch\.no_grad\(\)"):
        fused_decode_attention(**given)
    with torch.no_grad():
        fused_decode_attention(**given)
    op = torch.ops.proteus_deploy.decode_attention
    with pytest.raises(RuntimeError, match=r"backward through proteus_deploy\.decode_attention"):
        op(given["query"], given["keys"], given["values"], None, 33, None, None, 1.0, False)[
            0
        ].sum().backward()


def test_wrong_inputs_are_refused_by_name(randn: Randn) -> None:
    given = problem("odd head size, shared", randn)
    for change, message in (
        ({"query": randn(1, 5, 7)}, "5 query heads can't share 2 heads of keys and values"),
        ({"query": randn(2, 6, 7)}, r"keys has the shape \[1, 2, 40, 7\], expected \[2, any, any, 7\]"),
        (
            {"values": given["values"][:, :, 1:]},
            r"values has the shape \[1, 2, 39, 7\], expected \[1, 2, 40, 7\]",
        ),
        ({"values": given["values"].half()}, r"and values torch\.float16; convert them to one dtype"),
        ({"query": given["query"].double()}, "query is float64; the kernel takes float32, bfloat16, float16"),
        ({"length": 41}, "the length is 41; of 40 slots, 0 to 40 can be in use"),
        ({"length": -1}, "the length is -1"),
        ({"length": torch.tensor([3])}, "length is int64, and has to be int32; convert it"),
        ({"length": torch.tensor(3, dtype=torch.int32)}, r"length has the shape \[\], expected \[1\]"),
        ({"direction": randn(1, 7)}, r"direction has the shape \[1, 7\], expected \[1, 2, 7\]"),
        ({"mask": randn(1, 40)}, "mask is float32, and has to be bool; convert it"),
        ({"mask": randn(1, 39) > 0}, r"mask has the shape \[1, 39\], expected \[1, 40\]"),
        ({"backend": "cuda"}, "backend 'cuda' is unknown; there are triton, reference"),
    ):
        with pytest.raises(InputError, match=message):
            fused_decode_attention(**{**given, **change})
    wide = randn(1, 1, 1, 257)
    with pytest.raises(InputError, match=r"the head size is 257; the kernel takes 1 to 256\. Use backend="):
        fused_decode_attention(wide[0], wide, wide, 1)


@pytest.mark.gpu
@pytest.mark.parametrize(("images", "groups"), [(32, 20), (1, 20), (1, 5)])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_published_size(dtype: torch.dtype, images: int, groups: int, randn: Randn) -> None:
    """LlamaGen-XL's heads, guidance, a caption and half of an image; keys of each query's own, or shared."""
    keys, values = (randn(2 * images, groups, 632, 64, dtype=dtype) for _ in range(2))
    given = {
        "query": randn(2 * images, 20, 64, dtype=dtype), "keys": keys, "values": values, "length": 630,
        "direction": randn(2 * images, groups, 64), "mask": randn(2 * images, 632) > -1,
    }  # fmt: skip
    assert_is_the_reference(given)


@pytest.mark.gpu
def test_one_cuda_graph_serves_growing_lengths(randn: Randn) -> None:
    given = problem("one more than blocks, in splits", randn, torch.bfloat16)
    given["keys"], given["values"] = (given[name].nan_to_num() for name in ("keys", "values"))
    given["length"] = torch.full((2,), 1, dtype=torch.int32, device="cuda")
    fused_decode_attention(**given)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, similarity = fused_decode_attention(**given)
    for length in (1, 64, 150):
        given["length"].fill_(length)
        graph.replay()
        want, similar = exact(given)
        assert_close("attended", out, want, TOLERANCES["kernel", "bfloat16"])
        assert similarity is not None
        assert_close("similarity", similarity, similar, TOLERANCES["kernel", "float32"])
