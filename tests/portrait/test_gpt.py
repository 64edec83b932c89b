"""LlamaGen's decoder: the published names, its rotary table, and decoding beside a plain forward."""

from __future__ import annotations

from dataclasses import replace
from threading import Event
from typing import Literal

import pytest
import torch
from torch import Tensor

from proteus_deploy.errors import Cancelled, CheckpointError, InputError
from proteus_deploy.portrait.config import GPT_SIZES, GptConfig
from proteus_deploy.portrait.decoding import Decoding, draw_tokens
from proteus_deploy.portrait.gpt import Gpt, grid_rotary, rotate
from proteus_deploy.portrait.plan import DENSE, POLICIES, CacheSettings
from proteus_deploy.portrait.sampling import Sampling
from proteus_deploy.testing import Tolerance, assert_close
from proteus_deploy.tiny.portrait_checkpoint import RANDOM_GPT

FLOAT32 = Tolerance(2e-5, "relative", "float32 sums in another order")
SPARSE = [policy for policy in POLICIES if policy != "dense"]
CLASSES = replace(RANDOM_GPT, model_type="c2i", cls_token_num=1, num_classes=7)
SAMPLING = Sampling(guidance_scale=2.0, top_k=0, seed=5)


def random_gpt(config: GptConfig = RANDOM_GPT) -> Gpt:
    torch.manual_seed(0)
    return Gpt(config).eval().requires_grad_(False)


def captions(count: int, lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Features with zeros before each caption's own, and which positions are its own."""
    features = torch.randn(count, 32, 128, generator=torch.Generator().manual_seed(1))
    valid = torch.stack([torch.arange(32) >= 32 - length for length in lengths])
    return features * valid.unsqueeze(-1), valid


def forward_at_once(gpt: Gpt, features: Tensor, valid: Tensor, tokens: Tensor) -> Tensor:
    """Logits of every token from one forward without a cache, padding masked."""
    embedded = torch.cat([gpt.embed_condition(features), gpt.tok_embeddings(tokens[:, :-1])], dim=1)
    length = embedded.shape[1]
    seen = torch.nn.functional.pad(valid, (0, length - valid.shape[1]), value=True)
    mask = torch.ones(length, length, dtype=torch.bool).tril() & seen[:, None]
    mask = (mask | torch.eye(length, dtype=torch.bool)).unsqueeze(1)
    logits: Tensor = gpt(embedded, gpt.rotary[:length], mask=mask)
    return logits[:, valid.shape[1] - 1 :]


def decode(gpt: Gpt, cache: CacheSettings, features: Tensor, valid: Tensor, tokens: Tensor) -> Tensor:
    decoding = Decoding(gpt, cache, features, valid, guided=False)
    logits = [decoding.prefill()]
    logits += [decoding.step(column) for column in tokens.T[:-1]]
    return torch.stack(logits, dim=1)


def test_weights_have_the_published_names() -> None:
    shared = {"tok_embeddings.weight", "norm.weight", "output.weight"}
    block: tuple[str, ...] = (
        "attention.wqkv",
        "attention.wo",
        "feed_forward.w1",
        "feed_forward.w2",
        "feed_forward.w3",
    )
    block += ("attention_norm", "ffn_norm")
    shared |= {f"layers.{layer}.{name}.weight" for layer in range(2) for name in block}
    caption = {"uncond_embedding", "cap_proj.fc1.weight", "cap_proj.fc2.weight"}
    assert random_gpt().state_dict().keys() == shared | {f"cls_embedding.{name}" for name in caption}
    assert random_gpt(CLASSES).state_dict().keys() == shared | {"cls_embedding.embedding_table.weight"}


@pytest.mark.parametrize(("size", "millions"), [("GPT-B", 111), ("GPT-L", 343), ("GPT-XL", 775)])
def test_sizes_are_the_published_ones(size: str, millions: int) -> None:
    layers, heads, dim = GPT_SIZES[size]
    with torch.device("meta"):
        gpt = Gpt(GptConfig(dim=dim, n_layer=layers, n_head=heads))
    count = sum(parameter.numel() for parameter in gpt.parameters()) / 1e6
    assert count == pytest.approx(millions, abs=0.5)


def test_the_rotary_table_turns_with_row_and_column_and_is_zero_for_the_condition() -> None:
    table = grid_rotary(4, 8, 100.0, 3)
    assert table.shape == (3 + 16, 4, 2)
    assert table[:3].eq(0).all()
    row, column = 2, 3
    place = table[3 + row * 4 + column]
    angles = torch.tensor([row * 1.0, row * 0.1, column * 1.0, column * 0.1])
    assert_close("cosines", place[:, 0], angles.cos(), FLOAT32)
    assert_close("sines", place[:, 1], angles.sin(), FLOAT32)
    turned = rotate(torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 0]).view(1, 1, 1, 8), place.unsqueeze(0))[0, 0, 0]
    want = torch.tensor([angles[0].cos(), angles[0].sin(), -angles[1].sin(), angles[1].cos(), 0, 0, 0, 0])
    assert_close("turned", turned, want, FLOAT32)


@pytest.mark.parametrize("lengths", [(9, 9), (5, 12)])
def test_decoding_is_the_forward_at_once(lengths: tuple[int, int]) -> None:
    gpt = random_gpt()
    features, valid = captions(2, lengths)
    tokens = torch.randint(96, (2, 64), generator=torch.Generator().manual_seed(2))
    want = forward_at_once(gpt, features, valid, tokens)
    assert_close("logits", decode(gpt, DENSE, features, valid, tokens), want, FLOAT32)


@pytest.mark.parametrize("config", [RANDOM_GPT, replace(RANDOM_GPT, n_kv_head=1)])
def test_padding_that_all_share_changes_nothing(config: GptConfig) -> None:
    gpt = random_gpt(config)
    features, valid = captions(1, (9,))
    tokens = torch.randint(96, (1, 64), generator=torch.Generator().manual_seed(2))
    decoding = Decoding(gpt, DENSE, features, valid, guided=False)
    decoding.prefill()
    assert decoding.cache.seen == 9
    want = forward_at_once(gpt, features, valid, tokens)
    assert_close("logits", decode(gpt, DENSE, features, valid, tokens), want, FLOAT32)


@pytest.mark.parametrize("policy", SPARSE)
def test_with_room_for_everything_tokens_are_those_of_the_dense_cache(policy: str) -> None:
    gpt = random_gpt()
    features, valid = captions(2, (5, 12))
    dense = draw_tokens(gpt, DENSE, SAMPLING, features, valid)
    assert torch.equal(draw_tokens(gpt, CacheSettings(policy, 1.0), SAMPLING, features, valid), dense)
    if policy != "attention":  # which weighs by its parts; the others give the same bits
        logits = [decode(gpt, cache, features, valid, dense) for cache in (DENSE, CacheSettings(policy, 1.0))]
        assert torch.equal(*logits)


@pytest.mark.parametrize("scope", ["layer", "head"])
@pytest.mark.parametrize("policy", SPARSE)
def test_attention_is_among_what_is_kept(policy: str, scope: Literal["layer", "head"]) -> None:
    """Step by step, a sparse decoding is the forward at once, its mask hiding padding and what went."""
    # With one layer, keys and values don't depend on the mask.
    gpt = random_gpt(replace(RANDOM_GPT, n_layer=1))
    features, valid = captions(2, (5, 12))
    tokens = torch.randint(96, (2, 64), generator=torch.Generator().manual_seed(2))
    settings = CacheSettings(policy, 0.5, prefix=3, window=9, cadence=3, scope=scope)
    decoding = Decoding(gpt, settings, features, valid, guided=False)
    rows = torch.ones(2, RANDOM_GPT.n_head if scope == "head" else 1, 75, 75, dtype=torch.bool).tril()
    rows[..., :7] &= torch.tensor([False, True]).view(2, 1, 1, 1)
    logits = [decoding.prefill()]
    for query, column in enumerate(tokens.T[:-1], 12):
        logits.append(decoding.step(column))
        held = decoding.cache.positions[:, :, : decoding.cache.filled]
        kept = torch.zeros(*held.shape[:2], 76, dtype=torch.bool).scatter(2, held % 76, value=True)
        rows[:, :, query] &= kept[..., :75]
    assert rows[:, :, 50:].sum(dim=-1).max() <= 38
    assert rows[0, :, -1].sum(dim=-1).min() >= 36  # all slots but those of two steps
    rows |= torch.eye(75, dtype=torch.bool)
    embedded = torch.cat([gpt.embed_condition(features)[:, -12:], gpt.tok_embeddings(tokens[:, :-1])], dim=1)
    want = gpt(embedded, gpt.rotary[20:95], mask=rows)[:, 11:]
    assert_close("logits", torch.stack(logits, dim=1), want, FLOAT32)


@pytest.mark.parametrize("policy", SPARSE)
def test_images_do_not_depend_on_those_beside_them(policy: str) -> None:
    gpt = random_gpt(CLASSES)
    settings = CacheSettings(policy, 0.5, prefix=3, window=9)
    together = draw_tokens(gpt, settings, SAMPLING, torch.tensor([1, 4, 2]), seeds=[7, 8, 9])
    alone = draw_tokens(gpt, settings, SAMPLING, torch.tensor([4]), seeds=[8])
    assert torch.equal(together[1], alone[0])
    first = draw_tokens(gpt, settings, replace(SAMPLING, seed=7), torch.tensor([1, 4, 2]))
    assert torch.equal(first, together)


def test_a_cache_in_another_dtype() -> None:
    """Attention runs in the cache's; with weights in bfloat16 that is nearer to float32 than bfloat16 is."""
    gpt = random_gpt(CLASSES)
    tokens = torch.randint(96, (40, 1), generator=torch.Generator().manual_seed(2))
    settings = CacheSettings("adsa", 0.5, prefix=3, window=9)

    def last(cache_dtype: torch.dtype | None) -> tuple[torch.dtype, Tensor]:
        decoding = Decoding(gpt, settings, torch.tensor([3]), guided=False, cache_dtype=cache_dtype)
        logits = [decoding.prefill(), *(decoding.step(column) for column in tokens)]
        return decoding.cache.values.dtype, torch.cat(logits)

    _, want = last(None)
    gpt.cast(torch.bfloat16)
    errors = {}
    for dtype in (torch.bfloat16, torch.float32):
        kept, got = last(dtype)
        assert kept == dtype
        assert got.dtype == torch.float32
        errors[dtype] = float((got - want).norm() / want.norm())
    assert errors[torch.float32] < errors[torch.bfloat16] < 0.05


def test_guidance_halves_have_sets_of_their_own() -> None:
    decoding = Decoding(
        random_gpt(CLASSES), CacheSettings("adsa", 0.5, prefix=3, window=9), torch.tensor([3]), guided=True
    )
    decoding.prefill()
    for token in torch.randint(96, (60,), generator=torch.Generator().manual_seed(2)):
        logits = decoding.step(token.view(1))
    assert logits.shape == (2, 96)
    sets = decoding.cache.positions.view(2, 2, -1).sort(dim=-1).values  # layers, halves, slots
    assert not torch.equal(sets[1, 0], sets[1, 1])


def test_no_guidance_is_one_sequence() -> None:
    decoding = Decoding(random_gpt(CLASSES), DENSE, torch.tensor([3]), guided=False)
    assert decoding.prefill().shape == (1, 96)


def test_progress_and_cancelling() -> None:
    gpt, stop, seen = random_gpt(CLASSES), Event(), []

    def report(what: str, done: int, total: int) -> None:
        seen.append((what, done, total))
        if done == 5:
            stop.set()

    with pytest.raises(Cancelled, match="token 5 of 64"):
        draw_tokens(gpt, DENSE, SAMPLING, torch.tensor([1]), report=report, cancel=stop)
    assert seen == [("portrait", done, 64) for done in range(1, 6)]


def test_a_seed_for_each_image() -> None:
    with pytest.raises(InputError, match="1 seeds for 2 images"):
        draw_tokens(random_gpt(CLASSES), DENSE, SAMPLING, torch.tensor([1, 2]), seeds=[3])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"block_size": 60}, "block_size is 60; an image's tokens form a square"),
        ({"n_head": 5}, "dim 48 over 5 heads"),
        ({"n_kv_head": 2}, "3 heads can't share 2 heads of keys and values"),
        ({"model_type": "v2i"}, "model_type is 'v2i'; choose c2i"),
        ({"n_layer": 0}, "n_layer is 0"),
    ],
)
def test_sizes_that_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        replace(RANDOM_GPT, **fields)  # type: ignore[arg-type]
