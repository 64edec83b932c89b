"""Slots in the place of transformers' DynamicCache: the same tokens and choices, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BloomConfig,
    DynamicCache,
    FalconConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    T5Config,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from proteus_deploy.errors import InputError
from proteus_deploy.portrait.cache import SlotCache
from proteus_deploy.portrait.plan import POLICIES, CachePlan, CacheSettings
from proteus_deploy.portrait.transformers_cache import EvictingCache
from proteus_deploy.testing import Tolerance, assert_close

SPARSE = [policy for policy in POLICIES if policy != "dense"]
LAYERS, HEADS, KV_HEADS, SIZE = 3, 4, 2, 8
PROMPT, NEW = 6, 34
PLAN = CachePlan("adsa", slots=20, prefix=8, window=5)
FLOAT32 = Tolerance(1e-5, "relative", "float32 sums in another order")


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    return make_llama(KV_HEADS)


def make_llama(kv_heads: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=HEADS * SIZE,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=kv_heads,
        max_position_embeddings=256,
        initializer_range=0.4,  # so that tokens differ and depend on what is kept
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model: LlamaForCausalLM = LlamaForCausalLM(config).eval()  # type: ignore[no-untyped-call]
    return model


def prompts(count: int = 2, length: int = PROMPT) -> Tensor:
    """Without repeats: values of a token are the same each time in the first layer, and choices tied."""
    return torch.rand(count, 60, generator=torch.Generator().manual_seed(1)).argsort()[:, :length] + 1


def generate(model: Any, cache: Any, ids: Tensor, new: int = NEW, **options: Any) -> Tensor:
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, **options}
    tokens: Tensor = model.generate(ids, past_key_values=cache, max_new_tokens=new, **options)
    return tokens[:, ids.shape[1] :]


def watched(cache: EvictingCache, model: LlamaForCausalLM) -> AbstractContextManager[None]:
    return cache.observing(model) if cache.plan.policy == "attention" else nullcontext()


@contextmanager
def recorded(monkeypatch: pytest.MonkeyPatch, queries: list[Tensor]) -> Iterator[None]:
    """The queries of attention that tells its weights."""

    def record(module: Any, query: Tensor, *rest: Any, **options: Any) -> Any:
        queries.append(query.clone())
        return sdpa_attention_forward(module, query, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr("proteus_deploy.portrait.transformers_watch.sdpa_attention_forward", record)
        yield


@pytest.mark.parametrize("policy", POLICIES)
def test_enough_slots_give_the_tokens_of_the_dynamic_cache(llama: LlamaForCausalLM, policy: str) -> None:
    ids = prompts()
    want = generate(llama, DynamicCache(config=llama.config), ids)
    assert len(set(want.flatten().tolist())) > 10
    cache = EvictingCache(CacheSettings(policy, 1.0).plan(PROMPT, NEW, 5), llama.config)
    with watched(cache, llama):
        assert torch.equal(generate(llama, cache, ids), want)
    assert cache.get_seq_length() == PROMPT + NEW - 1


@pytest.mark.parametrize("kv_heads", [1, KV_HEADS, HEADS])
@pytest.mark.parametrize("scope", ["layer", "head"])
@pytest.mark.parametrize("cadence", [1, 4])
@pytest.mark.parametrize("policy", SPARSE)
def test_keeps_what_slots_fed_by_hand_keep(
    policy: str, cadence: int, scope: str, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = make_llama(kv_heads), prompts()
    cache = EvictingCache(replace(PLAN, policy=policy, cadence=cadence, scope=scope), model.config)  # type: ignore[arg-type]
    came: list[tuple[Tensor, Tensor]] = []
    queries: list[Tensor] = []
    update = EvictingCache.update

    def record(self: EvictingCache, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Any:
        came.append((key.clone(), value.clone()))
        return update(self, key, value, *rest, **options)

    monkeypatch.setattr(EvictingCache, "update", record)
    with recorded(monkeypatch, queries), watched(cache, model):
        generate(model, cache, ids)
    by_hand = SlotCache(cache.plan, len(ids), kv_heads, SIZE, layers=LAYERS)
    for call, (key, value) in enumerate(came):
        query = queries[call] if queries else torch.zeros(len(ids), HEADS, key.shape[2], SIZE)
        by_hand.layers[call % LAYERS].attend(query, key, value, None)
    assert bool(queries) is (policy == "attention")
    assert cache.slots is not None
    assert by_hand.seen == cache.slots.seen == PROMPT + NEW - 1
    filled = by_hand.filled
    assert torch.equal(cache.slots.positions[..., :filled], by_hand.positions[..., :filled])
    for mine, theirs in ((cache.slots.keys, by_hand.keys), (cache.slots.values, by_hand.values)):
        assert torch.equal(mine[:, :, :filled], theirs[:, :, :filled])


def test_queries_see_all_that_is_kept_and_nothing_else(llama: LlamaForCausalLM) -> None:
    """Against attention over all positions, with those that are given up hidden by a mask of four axes."""
    ids = prompts(1, PROMPT + NEW)
    cache = EvictingCache(replace(PLAN, policy="sink-window"), llama.config)
    everything = DynamicCache(config=llama.config)
    differ = 0
    with torch.no_grad():
        for start, end in [(0, PROMPT), *((one, one + 1) for one in range(PROMPT, PROMPT + NEW))]:
            got = llama(ids[:, start:end], past_key_values=cache).logits[:, -1]
            query, past = torch.arange(start, end)[:, None], torch.arange(end)
            recent = past > end - 1 - (PLAN.slots - PLAN.prefix)
            seen = (past <= query) & (recent | (past < PLAN.prefix))
            want = llama(
                ids[:, start:end], past_key_values=everything, attention_mask=seen[None, None]
            ).logits[:, -1]
            assert_close("logits", got, want, FLOAT32)
            differ += int(not bool(seen[-1].all()))
    assert differ == PROMPT + NEW - PLAN.slots


def test_one_position_at_a_time_is_the_prompt_at_once(llama: LlamaForCausalLM) -> None:
    ids = prompts(2, 8)
    with torch.no_grad():
        want = llama(ids, past_key_values=EvictingCache(PLAN, llama.config)).logits
        for pieces in ([1] * 8, [3, 5], [5, 1, 2]):
            cache = EvictingCache(PLAN, llama.config)
            got = [llama(piece, past_key_values=cache).logits for piece in ids.split(pieces, dim=1)]
            assert_close("logits", torch.cat(got, dim=1), want, FLOAT32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_takes_the_memory_of_its_slots(llama: LlamaForCausalLM, dtype: torch.dtype) -> None:
    cache = EvictingCache(PLAN, llama.config)
    assert cache.bytes == 0
    keys = torch.zeros(2, KV_HEADS, PROMPT, SIZE, dtype=dtype)
    for _ in range(3):
        for layer in range(LAYERS):
            cache.update(keys, keys, layer)
    assert cache.slots is not None
    assert cache.slots.keys.dtype == dtype
    assert cache.bytes == 2 * LAYERS * KV_HEADS * SIZE * PLAN.slots * 2 * dtype.itemsize
    parts: list[Any] = list(cache.layers)
    kept = {one.untyped_storage().data_ptr() for layer in parts for one in (layer.keys, layer.values)}
    assert kept == {one.untyped_storage().data_ptr() for one in (cache.slots.keys, cache.slots.values)}


def test_starts_anew_after_a_reset(llama: LlamaForCausalLM) -> None:
    cache = EvictingCache(replace(PLAN, policy="random"), llama.config)
    want = generate(llama, cache, prompts())
    cache.reset()
    assert cache.get_seq_length() == cache.bytes == 0
    assert cache.get_mask_sizes(5, 0) == (5, 0)
    assert torch.equal(generate(llama, cache, prompts()), want)
    cache.reset()
    assert generate(llama, cache, prompts(3)).shape == (3, NEW)  # another number of sequences


def padded(ids: Tensor) -> tuple[Tensor, Tensor]:
    """The second prompt is shorter by two, with padding in front; the mask beside it."""
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    return ids * mask, mask


@pytest.mark.parametrize("prefix", [8, 3])
@pytest.mark.parametrize(
    ("policy", "attention"),
    [*((policy, "sdpa") for policy in SPARSE if policy != "random"), ("adsa", "eager")],
)
def test_padding_in_the_prefix_stays_hidden(policy: str, attention: str, prefix: int) -> None:
    """A padded prompt gives what it gives by itself, in a cache whose prefix is as much shorter."""
    model = make_llama(KV_HEADS)
    model.set_attn_implementation(attention)
    ids = prompts(2, PROMPT + NEW)
    mask = padded(ids)[1]
    plan = replace(PLAN, policy=policy, prefix=prefix)
    cache = EvictingCache(plan, model.config)
    alone = EvictingCache(replace(plan, prefix=prefix - 2, slots=plan.slots - 2), model.config)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for one in (cache, alone) if prefix < PROMPT or policy == "attention" else ():
            stack.enter_context(one.observing(model))
        for start, end in [(0, PROMPT), *((one, one + 1) for one in range(PROMPT, PROMPT + NEW))]:
            got = model(
                ids[:, start:end],
                attention_mask=mask[:, :end],
                position_ids=mask.cumsum(dim=1)[:, start:end] - 1,
                past_key_values=cache,
            )
            want = model(ids[1:, max(2, start) : end], past_key_values=alone)
            assert_close("logits", got.logits[1, -1], want.logits[0, -1], FLOAT32)
    assert cache.slots is not None
    assert cache.slots.rule is not None
    assert all(bool(one.isfinite().all()) for one in cache.slots.rule.tensors())


def test_masks_that_reach_outside_the_prefix_are_refused(llama: LlamaForCausalLM) -> None:
    plan = replace(PLAN, prefix=1)
    ids, mask = padded(prompts())
    for attention_mask in (mask, torch.ones_like(mask)):  # nobody looks at it, so it might hide anything
        with pytest.raises(
            InputError, match=r"hide any of the prompt's 6 .*only the first 1 can be .*observing"
        ):
            generate(llama, EvictingCache(plan, llama.config), ids, attention_mask=attention_mask)
    cache = EvictingCache(plan, llama.config)
    with (
        cache.observing(llama),
        pytest.raises(InputError, match=r"mask hides position 1;.*only the first 1 can be"),
    ):
        generate(llama, cache, ids, attention_mask=mask)
    cache = EvictingCache(plan, llama.config)
    with cache.observing(llama):
        assert generate(llama, cache, ids).shape == (2, NEW)
    # As long as nothing is given up, masks are right wherever they hide something.
    short = generate(llama, EvictingCache(plan, llama.config), ids, 10, attention_mask=mask)
    assert torch.equal(
        short, generate(llama, DynamicCache(config=llama.config), ids, 10, attention_mask=mask)
    )


def test_masks_that_come_later_are_refused(llama: LlamaForCausalLM) -> None:
    for mask in (torch.ones(1, 20).index_fill(1, torch.tensor([15]), 0), torch.ones(1, 1, 1, 20).bool()):
        cache = EvictingCache(replace(PLAN, prefix=1), llama.config)
        with cache.observing(llama), torch.no_grad():
            for end in range(1, 20):
                llama(prompts(1, 1), attention_mask=torch.ones(1, end), past_key_values=cache)
            llama(prompts(1, 1), mask, past_key_values=cache)  # by its place, not by its name
            with pytest.raises(InputError, match=r"mask (hides position 15|isn't .sequences, positions.)"):
                llama(prompts(1, 1), past_key_values=cache)


def test_flash_attention_hides_nothing(llama: LlamaForCausalLM) -> None:
    """Its masks are cut at the front; without the package, only the cache's side can be shown."""
    config = LlamaConfig(**{**llama.config.to_dict(), "attn_implementation": "flash_attention_2"})
    cache = EvictingCache(PLAN, config)
    keys = torch.zeros(1, KV_HEADS, PROMPT, SIZE)

    def come(new: int) -> None:
        for layer in range(LAYERS):
            cache.update(keys[:, :, :new], keys[:, :, :new], layer)

    come(PROMPT)
    for _ in range(PLAN.slots - PROMPT):
        come(1)
    with pytest.raises(InputError, match="none can be, with flash attention"):
        come(1)


def test_beams_go_with_their_slots(llama: LlamaForCausalLM) -> None:
    ids = prompts()
    want = generate(llama, DynamicCache(config=llama.config), ids, num_beams=3)
    enough = EvictingCache(CacheSettings("adsa", 1.0).plan(PROMPT, NEW, 5), llama.config)
    assert torch.equal(generate(llama, enough, ids, num_beams=3), want)
    for policy in SPARSE:
        cache = EvictingCache(replace(PLAN, policy=policy), llama.config)
        with watched(cache, llama):
            assert generate(llama, cache, ids, num_beams=3).shape == (2, NEW)


@pytest.mark.parametrize("policy", ["adsa", "sink-window", "uniform", "attention"])
def test_chosen_sequences_go_on_as_they_would_have(llama: LlamaForCausalLM, policy: str) -> None:
    ids = prompts(3, PROMPT + NEW)
    plan = replace(PLAN, policy=policy, offload=True)
    chosen = torch.tensor([2, 0, 2, 2])
    straight, turned = EvictingCache(plan, llama.config), EvictingCache(plan, llama.config)
    with watched(straight, llama), torch.no_grad():
        llama(ids[chosen, :PROMPT], past_key_values=straight)
        for one in range(PROMPT, PROMPT + NEW):
            want = llama(ids[chosen, one : one + 1], past_key_values=straight).logits
    with watched(turned, llama), torch.no_grad():
        llama(ids[:, :PROMPT], past_key_values=turned)
        for one in range(PROMPT, 30):
            llama(ids[:, one : one + 1], past_key_values=turned)
        turned.batch_select_indices(torch.tensor([True, False, True]))
        turned.batch_repeat_interleave(2)
        turned.reorder_cache(torch.tensor([2, 0, 3, 2]))
        for one in range(30, PROMPT + NEW):
            got = llama(ids[chosen, one : one + 1], past_key_values=turned).logits
    assert_close("logits", got, want, FLOAT32)
    assert straight.slots is not None
    assert turned.slots is not None
    filled = straight.slots.filled
    kept = [one.slots.positions[..., :filled].sort(dim=-1).values for one in (straight, turned)]  # type: ignore[union-attr]
    assert torch.equal(*kept)
    gone = [torch.cat([part[0] for part in one.offloaded], dim=-1) for one in (straight.slots, turned.slots)]
    assert torch.equal(*gone)
    assert gone[0].shape[-1] == PROMPT + NEW - filled


def test_attention_weights_are_asked_for(llama: LlamaForCausalLM) -> None:
    cache = EvictingCache(replace(PLAN, policy="attention"), llama.config)
    with pytest.raises(InputError, match=r"'attention' needs attention weights.*cache.observing\(model\)"):
        generate(llama, cache, prompts())
    cache.reset()
    with cache.observing(llama):
        generate(llama, cache, prompts(), 3)
        with pytest.raises(InputError, match="observing already"), cache.observing(llama):
            pass
    assert llama.config._attn_implementation == "sdpa"
    assert not llama._forward_pre_hooks
    with pytest.raises(InputError, match="'attention' needs attention weights"), torch.no_grad():
        llama(prompts(2, 1), past_key_values=cache)


def test_attention_weights_that_get_lost_are_missed(
    llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = EvictingCache(replace(PLAN, policy="attention"), llama.config)
    update = EvictingCache.update

    def copied(self: EvictingCache, key: Tensor, value: Tensor, layer: int) -> Any:
        keys, values = update(self, key, value, layer)
        return (keys.clone() if layer == 1 else keys), values

    monkeypatch.setattr(EvictingCache, "update", copied)
    with cache.observing(llama), pytest.raises(InputError, match="weights of 2 of 3 layers"):
        generate(llama, cache, prompts())


def test_weights_are_told_beside_sdpa_only() -> None:
    model = make_llama(KV_HEADS)
    model.set_attn_implementation("eager")
    cache = EvictingCache(replace(PLAN, policy="attention"), model.config)
    message = r"'eager'.*load the model with attn_implementation"
    with pytest.raises(InputError, match=message), cache.observing(model):
        pass
    assert model.config._attn_implementation == "eager"
    other = EvictingCache(PLAN, LlamaConfig())
    with pytest.raises(InputError, match="has another config"), other.observing(model):
        pass


def test_a_model_in_use_elsewhere_is_not_disturbed(llama: LlamaForCausalLM) -> None:
    """Observed attention attends as ever for other caches, and for none."""
    ids = prompts()
    want = generate(llama, DynamicCache(config=llama.config), ids)
    with EvictingCache(replace(PLAN, policy="attention"), llama.config).observing(llama):
        assert torch.equal(generate(llama, DynamicCache(config=llama.config), ids), want)
        with torch.no_grad():
            logits = llama(ids).logits
    with torch.no_grad():
        assert torch.equal(logits, llama(ids).logits)


def test_what_cannot_be_undone_is_refused(llama: LlamaForCausalLM) -> None:
    cache = EvictingCache(PLAN, llama.config)
    generate(llama, cache, prompts())
    cache.crop(0)
    with pytest.raises(InputError, match="last 3 back"):
        cache.crop(-3)
    assert not cache.is_croppable
    with pytest.raises(InputError, match="2 positions at once, after 19 were given up"), torch.no_grad():
        llama(prompts(2, 2), past_key_values=cache)
    with pytest.raises(InputError, match="prompt has to fit"):
        generate(llama, EvictingCache(PLAN, llama.config), prompts(1, PLAN.slots + 1))
    with pytest.raises(InputError, match="no_grad"):
        llama(prompts(), past_key_values=EvictingCache(PLAN, llama.config))
    with pytest.raises(InputError, match="prompt look-up"):
        generate(
            llama, EvictingCache(PLAN, llama.config), prompts(1).repeat(1, 2), prompt_lookup_num_tokens=2
        )
    dense = EvictingCache(CachePlan("dense", PROMPT + 3), llama.config)
    assert dense.get_max_length() == PROMPT + 3
    with pytest.raises(InputError, match="0 of 9 slots free"):
        generate(llama, dense, prompts())


def test_calls_that_do_not_belong_together_are_refused(llama: LlamaForCausalLM) -> None:
    cache = EvictingCache(PLAN, llama.config)
    keys = torch.zeros(2, KV_HEADS, 3, SIZE)
    with pytest.raises(InputError, match="layer 1 comes first"):
        cache.update(keys, keys, 1)
    with pytest.raises(InputError, match="both alike"):
        cache.update(keys, keys[..., :4], 0)
    cache.update(keys, keys, 0)
    for wrong in (keys[:1], keys[:, :1], keys[..., :4], keys.double()):
        with pytest.raises(InputError, match=r"layer 1 has keys .* same heads, head size, dtype and device"):
            cache.update(wrong, keys, 1)
    part: Any = cache.layers[0]
    with pytest.raises(InputError, match="call reset of the cache"):
        part.reset()
    with pytest.raises(InputError, match="call reorder_cache of the cache"):
        part.reorder_cache(torch.tensor([1, 0]))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MistralConfig(num_hidden_layers=2), "mistral has layers that don't see every position"),
        (Gemma3TextConfig(num_hidden_layers=6), "gemma3_text has layers that don't see every position"),
        (T5Config(), "t5 has an encoder"),
        (BloomConfig(), "bloom isn't known to have its positions in its keys"),
        (GPTNeoConfig(), "gpt_neo isn't known"),
        (FalconConfig(alibi=True), "falcon isn't known"),
    ],
    ids=["sliding", "hybrid", "encoder", "alibi", "local", "alibi beside rotary"],
)
def test_models_that_it_would_be_wrong_for_are_refused(config: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        EvictingCache(PLAN, config)


def test_a_model_with_positions_at_its_input() -> None:
    config = GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.4)
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config).eval()  # type: ignore[no-untyped-call]
    ids = prompts()
    want = generate(model, DynamicCache(config=config), ids, pad_token_id=0)
    for policy in POLICIES:
        cache = EvictingCache(CacheSettings(policy, 1.0).plan(PROMPT, NEW, 5), config)
        with watched(cache, model):
            assert torch.equal(generate(model, cache, ids, pad_token_id=0), want)
    for policy in SPARSE:
        cache = EvictingCache(replace(PLAN, policy=policy), config)
        with watched(cache, model):
            assert generate(model, cache, ids, pad_token_id=0).shape == want.shape
