"""Caches with a fixed number of slots: what stays, what it is worth, and what it takes in memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from proteus_deploy.errors import InputError
from proteus_deploy.portrait.cache import SlotCache, make_cache
from proteus_deploy.portrait.config import GptConfig
from proteus_deploy.portrait.eviction import Redundancy, pairwise_redundancy
from proteus_deploy.portrait.plan import DENSE, POLICIES, CachePlan, CacheSettings
from proteus_deploy.testing import Tolerance, assert_close
from proteus_deploy.tiny.portrait_checkpoint import RANDOM_GPT

SPARSE = [policy for policy in POLICIES if policy != "dense"]
SEQUENCES, HEADS, SIZE, LAYERS = 2, 3, 8, 2
EXACT = Tolerance(1e-6, "absolute", "the running sum is the definition, but for rounding in float32")
FLOAT32 = Tolerance(1e-5, "relative", "float32 sums in another order")
PLAN = CachePlan("adsa", slots=24, prefix=4, window=6)


def feed(cache: SlotCache, seed: int = 0) -> tuple[Tensor, Tensor]:
    """One more position for every layer; its keys and values [layers x sequences, heads, size]."""
    generator = torch.Generator().manual_seed(1000 * seed + cache.seen)
    shape = (2, LAYERS, SEQUENCES, HEADS, 1, SIZE)
    # Off zero, so that values resemble each other and redundancies differ.
    key, value = torch.randn(shape, generator=generator) + 0.5
    query = torch.zeros(SEQUENCES, HEADS, 1, SIZE)
    for layer, new_key, new_value in zip(cache.layers, key, value, strict=True):
        layer.attend(query, new_key, new_value, None)
    return key.flatten(0, 1)[:, :, 0], value.flatten(0, 1)[:, :, 0]


def new_cache(plan: CachePlan, padding: Tensor | None = None) -> SlotCache:
    return SlotCache(plan, SEQUENCES, HEADS, SIZE, layers=LAYERS, padding=padding)


def kept(cache: SlotCache, sequence: int, row: int = 0) -> list[int]:
    return sorted(cache.positions[sequence, row, : cache.filled].tolist())


@pytest.mark.parametrize("scope", ["layer", "head"])
@pytest.mark.parametrize("cadence", [1, 5])
@pytest.mark.parametrize("policy", SPARSE)
def test_prefix_and_window_stay_and_slots_hold_what_they_say(policy: str, cadence: int, scope: str) -> None:
    cache = new_cache(replace(PLAN, policy=policy, cadence=cadence, scope=scope))  # type: ignore[arg-type]
    came: list[tuple[Tensor, Tensor]] = []
    for position in range(80):
        came.append(feed(cache))
        assert cache.filled <= 24
        assert cache.filled > 24 - cadence or position < 24
        for sequence in range(LAYERS * SEQUENCES):
            for row in range(cache.rows):
                positions = kept(cache, sequence, row)
                always = {*range(min(position + 1, 4)), *range(max(0, position - 5), position + 1)}
                assert len(set(positions)) == cache.filled
                assert always <= set(positions)
    for sequence in range(LAYERS * SEQUENCES):
        for head in range(HEADS):
            row = head if cache.rows > 1 else 0
            for slot, position in enumerate(cache.positions[sequence, row, : cache.filled].tolist()):
                for mine, told in ((cache.keys, came[position][0]), (cache.values, came[position][1])):
                    assert torch.equal(mine[sequence, head, slot], told[sequence, head])


@pytest.mark.parametrize("scope", ["layer", "head"])
@pytest.mark.parametrize("cadence", [1, 4])
@pytest.mark.parametrize("redundancy", ["kept", "seen"])
@pytest.mark.parametrize("padding", [None, [[False, False, False], [True, True, True]]])
def test_the_running_sum_is_the_pairwise_definition(
    padding: list[list[bool]] | None, redundancy: str, cadence: int, scope: str
) -> None:
    plan = replace(PLAN, cadence=cadence, scope=scope, redundancy=redundancy)  # type: ignore[arg-type]
    cache = new_cache(plan, None if padding is None else torch.tensor(padding))
    came: list[Tensor] = []
    compared = 0
    for position in range(120):
        if cache.filled == plan.slots:
            found = -cache.rule.worth(cache)  # type: ignore[union-attr]
            for sequence in range(LAYERS * SEQUENCES):
                for row in range(cache.rows):
                    held = cache.positions[sequence, row, : cache.filled]
                    between = (held >= plan.prefix) & (held <= position - plan.window)
                    others = held[between].tolist()
                    if redundancy == "seen":
                        others += sorted(set(range(plan.prefix, position - plan.window + 1)) - set(others))
                    values = torch.stack([came[other][sequence] for other in others]).double()
                    values = values[:, row] if scope == "head" else values.flatten(1)
                    want = pairwise_redundancy(values)[: int(between.sum())]
                    assert_close("redundancy", found[sequence, row][between].double(), want, EXACT)
                    compared += 1
        came.append(feed(cache)[1])
    assert compared >= 4 * 20


@pytest.mark.parametrize("scope", ["layer", "head"])
@pytest.mark.parametrize("cadence", [1, 4])
@pytest.mark.parametrize("policy", SPARSE)
def test_padding_goes_first(policy: str, cadence: int, scope: str) -> None:
    """Up to three positions of a prompt of six: while some are there, nothing else is given up."""
    plan = replace(PLAN, policy=policy, prefix=7, cadence=cadence, scope=scope)  # type: ignore[arg-type]
    padding = torch.tensor([[True, True, True, False, False, False], [True] + [False] * 5])
    cache = new_cache(plan, padding)
    while cache.seen < 40:
        feed(cache)
        visible = cache.visible()
        assert visible is not None or cache.seen > 24
        for sequence in range(LAYERS * SEQUENCES):
            hidden = 3 if sequence % SEQUENCES == 0 else 1
            for row in range(cache.rows):
                positions = cache.positions[sequence, row, : cache.filled]
                real = positions[positions >= 0].tolist()
                assert len(real) == max(0, min(cache.filled, cache.seen - hidden))
                assert len(set(real)) == len(real)
                assert set(range(hidden, min(cache.seen, 7))) <= set(real)
                if visible is not None:  # one answer for all layers and heads
                    assert torch.equal(visible[sequence % SEQUENCES, 0, 0], positions >= 0)
    assert cache.visible() is None
    assert new_cache(plan).visible() is None


def test_the_most_redundant_goes() -> None:
    cache = SlotCache(CachePlan("adsa", slots=6, prefix=1, window=2), 1, 1, 4)
    values = torch.eye(4)[[0, 1, 2, 1, 3, 0, 0]]  # positions 1 and 3 are the same
    for value in values:
        cache.take_in(value.view(1, 1, 1, 4), value.view(1, 1, 1, 4))
    assert kept(cache, 0) in ([0, 2, 3, 4, 5, 6], [0, 1, 2, 4, 5, 6])


def test_oldest_and_evenly_spaced() -> None:
    oldest, even = (new_cache(replace(PLAN, policy=policy)) for policy in ("sink-window", "uniform"))
    for _ in range(68):
        feed(oldest)
        feed(even)
    assert kept(oldest, 0) == [0, 1, 2, 3, *range(48, 68)]
    # 14 of the 58 between prefix and window: every fourth, but for one.
    gaps = torch.tensor(kept(even, 0)[4:18]).diff()
    assert set(gaps.tolist()) <= {4, 8}
    assert (gaps == 4).sum() >= 12


def test_the_most_looked_at_stays() -> None:
    cache = SlotCache(CachePlan("attention", slots=8, prefix=1, window=2), 1, 1, 4)
    (layer,) = cache.layers
    for position in range(30):
        key = torch.zeros(1, 1, 1, 4)
        key[..., 0] = 5.0 * (position in (3, 9))  # every query looks at these two
        query = torch.tensor([4.0, 0, 0, 0]).view(1, 1, 1, 4)
        layer.attend(query, key, key, None)
    assert {3, 9} <= set(kept(cache, 0))


def test_random_choices_follow_the_seed() -> None:
    found = []
    for seed in (0, 0, 1):
        cache = new_cache(replace(PLAN, policy="random", seed=seed))
        for _ in range(60):
            feed(cache)
        found.append(cache.positions.sort(dim=-1).values)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert torch.equal(found[0][0], found[0][1])  # so that an image doesn't depend on those beside it
    assert not torch.equal(found[0][0], found[0][SEQUENCES])  # each layer has choices of its own


def test_what_was_given_up_is_in_host_memory() -> None:
    cache = new_cache(replace(PLAN, offload=True, cadence=3))
    came = [feed(cache) for _ in range(60)]
    positions = torch.cat([one[0] for one in cache.offloaded], dim=-1)
    for sequence in range(LAYERS * SEQUENCES):
        everything = sorted(positions[sequence, 0].tolist() + kept(cache, sequence))
        assert everything == list(range(60))
    for gone, keys, values in cache.offloaded:
        for slot, position in enumerate(gone[1, 0].tolist()):
            assert torch.equal(keys[1, :, slot], came[position][0][1])
            assert torch.equal(values[1, :, slot], came[position][1][1])
    assert new_cache(PLAN).offloaded == []


def test_nothing_is_made_anew() -> None:
    cache = new_cache(PLAN)
    feed(cache)
    places = [one.data_ptr() for one in (cache.keys, cache.values, cache.positions)]
    for _ in range(60):
        feed(cache)
    assert places == [one.data_ptr() for one in (cache.keys, cache.values, cache.positions)]
    assert cache.keys.shape[2] == 24


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_the_formula(dtype: torch.dtype) -> None:
    xl = GptConfig(dim=1280, n_layer=36, n_head=20)
    assert xl.cache_bytes(tokens=1, sequences=1, element_bytes=2) == 184_320  # a published figure
    for budget in (1.0, 0.5):
        settings_ = DENSE if budget == 1 else CacheSettings("adsa", budget, prefix=0, window=9)
        plan = settings_.plan(RANDOM_GPT.cls_token_num, RANDOM_GPT.block_size, RANDOM_GPT.grid_size)
        cache = make_cache(RANDOM_GPT, plan, 4, dtype=dtype)
        assert cache.bytes == RANDOM_GPT.cache_bytes(plan.slots, 4, dtype.itemsize)
        assert cache.bytes == cache.keys.untyped_storage().nbytes() + cache.values.untyped_storage().nbytes()
        assert plan.slots == round(budget * RANDOM_GPT.length)


def test_grouped_heads_attend_as_repeated_ones_do() -> None:
    cache = SlotCache(CachePlan("dense", 16), 2, 2, 8)
    (layer,) = cache.layers
    key, value = torch.randn(2, 2, 2, 10, 8)
    query = torch.randn(2, 6, 10, 8)
    got = layer.attend(query, key, value, None)
    want = torch.nn.functional.scaled_dot_product_attention(
        query, key.repeat_interleave(3, 1), value.repeat_interleave(3, 1), is_causal=True
    )
    assert_close("attention", got, want, FLOAT32)


@given(
    slots=st.integers(6, 30),
    prefix=st.integers(0, 6),
    window=st.integers(1, 8),
    cadence=st.integers(1, 6),
    length=st.integers(1, 90),
    policy=st.sampled_from(SPARSE),
)
@settings(deadline=None, max_examples=60)
def test_any_plan_that_is_accepted_works(
    slots: int, prefix: int, window: int, cadence: int, length: int, policy: str
) -> None:
    try:
        plan = CachePlan(policy, slots, prefix, window, cadence)
    except InputError:
        assert prefix + window + cadence > slots + 1
        return
    cache = SlotCache(plan, 1, 1, 4)
    (layer,) = cache.layers
    for position in range(length):
        key, value = torch.randn(2, 1, 1, 1, 4)
        layer.attend(key, key, value, None)
        positions = kept(cache, 0)
        assert set(range(min(prefix, position + 1))) <= set(positions)
        assert set(range(max(0, position - window + 1), position + 1)) <= set(positions)
        assert len(positions) == len(set(positions)) <= slots


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"policy": "h2o"}, "no cache policy 'h2o'; choose dense, adsa"),
        ({"slots": 10}, "10 slots can't hold a prefix of 4, a window of 6 and 2"),
        ({"window": 0}, "window is 0; choose a whole number, at least 1"),
        ({"cadence": 0}, "cadence is 0; choose a whole number, at least 1"),
        ({"scope": "token"}, "scope is 'token'; choose layer or head"),
        ({"redundancy": "all"}, "redundancy is 'all'; choose kept or seen"),
    ],
)
def test_plans_that_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(PLAN, **{"cadence": 2, **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"budget": 0.0}, r"budget is 0.0; choose a share of the positions above 0, up to 1"),
        ({"budget": 1.5}, r"budget is 1.5"),
        ({"policy": "dense"}, r"dense keeps everything: its budget is 1, not 0.5"),
        ({"policy": "nonsense"}, r"no cache policy 'nonsense'"),
        ({"prefix": -4}, r"prefix is -4; choose a whole number, at least 0"),
        ({"window": 0}, r"window is 0"),
        ({"cadence": 2.0}, r"cadence is 2.0; choose a whole number"),
        ({"scope": "token"}, r"scope is 'token'"),
        ({"redundancy": "all"}, r"redundancy is 'all'"),
    ],
)
def test_settings_that_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        CacheSettings(**fields)


def test_the_kernel_gives_no_weights() -> None:
    with pytest.raises(InputError, match="'attention' asks for attention weights"):
        SlotCache(CachePlan("attention", 8), 1, 1, 4, kernel="triton")


def test_a_prompt_that_does_not_fit_and_an_image_that_does_not_end() -> None:
    long = torch.randn(SEQUENCES, HEADS, 25, SIZE)
    with pytest.raises(InputError, match="25 new positions for a cache with 24 of 24 slots free"):
        new_cache(PLAN).layers[0].take_in(long, long)
    cache = SlotCache(CachePlan("dense", 3), 1, 1, 4)
    one = torch.randn(1, 1, 1, 4)
    for _ in range(3):
        cache.take_in(one, one)
    with pytest.raises(InputError, match="an image has to end"):
        cache.take_in(one, one)


def test_the_sum_is_kept_over_many_positions() -> None:
    """Adding and taking away in float32 doesn't drift: after 3000 positions it is still the definition's."""
    plan = CachePlan("adsa", slots=64, prefix=2, window=8)
    cache = SlotCache(plan, 1, 1, 32)
    generator = torch.Generator().manual_seed(3)
    for _ in range(3000):
        value = torch.randn(1, 1, 1, 32, generator=generator) + 0.3
        cache.take_in(value, value)
    assert isinstance(cache.rule, Redundancy)
    found = -cache.rule.worth(cache)[0, 0]
    held = cache.positions[0, 0]
    between = (held >= 2) & (held <= 3000 - 8)
    want = pairwise_redundancy(cache.values[0, 0][between].double())
    assert_close("redundancy", found[between].double(), want, EXACT)
