"""Janus as a painter: transformers' own tokens, every cache policy, and checkpoints that aren't whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import JanusForConditionalGeneration, JanusProcessor, PreTrainedTokenizerFast
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil
from transformers.utils import logging

from proteus_deploy.errors import Cancelled, CheckpointError, InputError
from proteus_deploy.portrait.janus import JanusDecoding, JanusPainter
from proteus_deploy.portrait.opening import open_painter
from proteus_deploy.portrait.painter import TorchPainter
from proteus_deploy.portrait.plan import DENSE, POLICIES, CacheSettings
from proteus_deploy.portrait.sampling import Sampling
from proteus_deploy.tiny.janus_checkpoint import write_random_janus

CAPTION = "a woman with long red hair in a green hoodie in a grey room"
OTHER = "an old man"
TOKENS = 64
GREEDY = Sampling(guidance_scale=5.0, temperature=0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_janus(tmp_path_factory.mktemp("janus") / "checkpoint")


@pytest.fixture(scope="module")
def painter(folder: Path) -> JanusPainter:
    return JanusPainter(folder)


@pytest.fixture(scope="module")
def published(folder: Path) -> Any:
    """The model as transformers opens it."""
    progress: Any = logging
    progress.disable_progress_bar()
    model = JanusForConditionalGeneration.from_pretrained(str(folder), local_files_only=True)
    progress.enable_progress_bar()
    return model


@pytest.fixture(scope="module")
def processor(folder: Path) -> Any:
    """transformers' processor, with the image processor that does without torchvision."""
    tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    images: Any = JanusImageProcessorPil
    return JanusProcessor(
        images.from_pretrained(str(folder), local_files_only=True),
        tokenizer,
        chat_template=(folder / "chat_template.jinja").read_text(encoding="utf-8"),
    )


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def change(file: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads(file.read_text())
    edit(document)
    file.write_text(json.dumps(document))


def prompt_of(processor: Any, caption: str) -> Any:
    """As transformers' documentation makes one."""
    turn = [{"role": "user", "content": [{"type": "text", "text": caption}]}]
    text = processor.apply_chat_template(turn, add_generation_prompt=True)
    return processor(text=text, generation_mode="image", return_tensors="pt")


def sparse(policy: str, **fields: Any) -> CacheSettings:
    return DENSE if policy == "dense" else CacheSettings(policy, 0.6, **fields)


def test_prompts_are_those_of_the_published_processor(painter: JanusPainter, processor: Any) -> None:
    for caption in (CAPTION, OTHER, "  Ein Mädchen, 日本語 \n"):
        prompt = prompt_of(processor, caption).input_ids[0].tolist()
        assert painter.prompt(caption) == prompt
        assert prompt[0] == painter.tokenizer.bos_token_id
        assert painter.tokenizer.decode(prompt[-1:]) == "<begin_of_image>"


@pytest.mark.parametrize("guidance", [5.0, 1.5])
def test_the_likeliest_tokens_are_those_of_transformers(
    painter: JanusPainter, published: Any, processor: Any, guidance: float
) -> None:
    sampling = Sampling(guidance_scale=guidance, temperature=0.0)
    found = painter.draw_tokens([CAPTION, OTHER], sampling=sampling, cache=DENSE)
    assert len(set(found.flatten().tolist())) > 15
    assert not torch.equal(found[0], found[1])
    for tokens, caption in zip(found, [CAPTION, OTHER], strict=True):
        want = published.generate(
            **prompt_of(processor, caption), generation_mode="image", do_sample=False, guidance_scale=guidance
        )
        assert tokens.tolist() == want[0].tolist()


def test_pictures_are_those_of_transformers(painter: JanusPainter, published: Any, processor: Any) -> None:
    tokens = torch.randint(96, (2, TOKENS))
    with torch.no_grad():
        decoded = list(published.decode_image_tokens(tokens).permute(0, 3, 1, 2))
    want = processor.postprocess(decoded, return_tensors="PIL.Image.Image")["pixel_values"]
    for mine, theirs in zip(painter.pictures(tokens), want, strict=True):
        assert mine.shape == (16, 16, 3)
        assert mine.dtype == np.uint8
        assert mine.std() > 5
        # transformers cuts off what follows the point, and we round.
        assert np.abs(mine.astype(int) - np.asarray(theirs).astype(int)).max() <= 1


@pytest.mark.parametrize("policy", POLICIES)
def test_enough_slots_are_no_cache_policy(
    painter: JanusPainter, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: in tokens, and in the logits that they are drawn from."""
    seen: list[Tensor] = []
    step = JanusDecoding.step

    def record(self: JanusDecoding, tokens: Tensor) -> Tensor:
        seen.append(step(self, tokens))
        return seen[-1]

    monkeypatch.setattr(JanusDecoding, "step", record)
    found = [
        painter.draw_tokens([CAPTION, CAPTION], cache=cache, seeds=[3, 4])
        for cache in (DENSE, CacheSettings(policy, 1.0))
    ]
    assert torch.equal(*found)
    assert not torch.equal(found[0][0], found[0][1])
    first, second = torch.stack(seen).chunk(2)
    assert torch.equal(first, second)


@pytest.mark.parametrize("scope", ["layer", "head"])
@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_draws(painter: JanusPainter, policy: str, scope: str) -> None:
    cache = sparse(policy, scope=scope) if policy != "dense" else DENSE
    pictures = painter.draw([CAPTION, OTHER], cache=cache)
    again = painter.draw([CAPTION, OTHER], cache=cache)
    assert [picture.shape for picture in pictures] == [(16, 16, 3)] * 2
    assert all(picture.std() > 5 for picture in pictures)
    assert all(np.array_equal(*both) for both in zip(pictures, again, strict=True))


def test_the_prompt_stays_and_the_budget_is_kept(painter: JanusPainter) -> None:
    ids = torch.tensor([painter.prompt(CAPTION)])
    count = ids.shape[1]
    slots = CacheSettings("adsa", 0.6).plan(count, TOKENS, 8).slots
    for policy in POLICIES:
        decoding = JanusDecoding(painter, sparse(policy, cadence=1), ids, guided=True)
        with decoding.observing():
            decoding.prefill()
            for token in range(TOKENS - 1):
                decoding.step(torch.tensor([token]))
        held = decoding.cache.slots
        assert held is not None
        assert held.seen == count + TOKENS - 1
        if policy != "dense":
            assert held.filled == slots < held.seen
            prefix = count + round(0.05 * TOKENS)
            assert torch.equal(held.positions[..., :prefix], torch.arange(prefix).expand(4, 1, -1))
        # Two layers, two rows under guidance, two heads of keys, 16 channels, float32.
        assert decoding.cache.bytes == 2 * 2 * 2 * 2 * 16 * 4 * held.plan.slots


def test_an_image_has_nothing_to_do_with_those_beside_it(painter: JanusPainter) -> None:
    alike = CAPTION.replace("red", "grey")
    captions = [CAPTION, OTHER, alike, CAPTION]
    assert len(painter.prompt(alike)) == len(painter.prompt(CAPTION))
    cache = CacheSettings("adsa", 0.6)
    together = painter.draw_tokens(captions, cache=cache, seeds=[1, 2, 3, 4])
    for row, caption in enumerate(captions):
        alone = painter.draw_tokens([caption], cache=cache, seeds=[row + 1])
        assert torch.equal(together[row], alone[0])
    following = painter.draw_tokens(captions, cache=cache, sampling=Sampling(5.0, top_k=0, seed=1))
    assert torch.equal(following, together)


def test_without_guidance_the_caption_alone_counts(painter: JanusPainter) -> None:
    ids = torch.tensor([painter.prompt(OTHER)])
    decoding = JanusDecoding(painter, DENSE, ids, guided=False)
    logits = decoding.prefill()
    guided = JanusDecoding(painter, DENSE, ids, guided=True).prefill()
    assert logits.shape == (1, 96)
    assert guided.shape == (2, 96)
    assert torch.allclose(guided[0], logits[0], atol=1e-5)
    assert not torch.allclose(guided[1], logits[0], atol=1e-1)
    greedy = Sampling(1.0, temperature=0.0)
    assert painter.draw_tokens([OTHER], sampling=greedy, cache=DENSE)[0, 0] == logits[0].argmax()


def test_progress_is_counted_over_all_groups(painter: JanusPainter) -> None:
    reports: list[tuple[str, int, int]] = []
    painter.draw_tokens([CAPTION, OTHER, CAPTION], cache=DENSE, report=lambda *one: reports.append(one))
    assert reports == [("portrait", done, 2 * TOKENS) for done in range(1, 2 * TOKENS + 1)]


def test_it_stops_between_two_tokens(painter: JanusPainter) -> None:
    cancel = Event()
    reports: list[int] = []

    def report(_: str, done: int, __: int) -> None:
        reports.append(done)
        if done == TOKENS + 5:
            cancel.set()

    attention = CacheSettings("attention", 0.6)
    with pytest.raises(Cancelled, match="at token 5 of 64"):
        painter.draw([CAPTION, OTHER], cache=attention, report=report, cancel=cancel)
    assert reports[-1] == TOKENS + 5
    assert painter.draw([OTHER], cache=attention)  # the model's attention is set back


def test_lower_precision_is_of_the_decoder_only(folder: Path, painter: JanusPainter) -> None:
    half = JanusPainter(folder, dtype="bfloat16")
    assert half.model.model.language_model.norm.weight.dtype == torch.bfloat16
    assert half.model.model.language_model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(half.draw_tokens([OTHER]), half.draw_tokens([OTHER]))
    tokens = torch.randint(96, (1, TOKENS))
    assert np.array_equal(half.pictures(tokens)[0], painter.pictures(tokens)[0])


def test_the_folder_says_which_painter(folder: Path, copy: Path, portrait_folder: Path) -> None:
    opened = open_painter(folder)
    assert isinstance(opened, JanusPainter)
    assert opened.sampling == Sampling(guidance_scale=5.0, top_k=0)
    assert opened.cache == CacheSettings()
    assert isinstance(open_painter(portrait_folder), TorchPainter)
    change(copy / "generation_config.json", lambda document: document.update(guidance_scale=3))
    assert open_painter(copy).sampling.guidance_scale == 3
    change(copy / "generation_config.json", lambda document: document.pop("guidance_scale"))
    assert open_painter(copy).sampling.guidance_scale == 5
    told = JanusPainter(copy, sampling=GREEDY, cache=DENSE)
    assert (told.sampling, told.cache) == (GREEDY, DENSE)
    change(copy / "config.json", lambda document: document.update(model_type="llama"))
    with pytest.raises(CheckpointError, match=r"has no portrait\.json"):
        open_painter(copy)
    with pytest.raises(CheckpointError, match=r"no config\.json of model_type janus"):
        JanusPainter(copy)


def test_older_files_of_the_layout_open(folder: Path, copy: Path) -> None:
    """Earlier versions of transformers wrote the chat template as JSON, and shards with an index."""
    template = (copy / "chat_template.jinja").read_text(encoding="utf-8")
    (copy / "chat_template.jinja").unlink()
    (copy / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    weights = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    names = sorted(weights)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: weights[name] for name in part}, copy / file, {"format": "pt"})
    index = {name: file for file, part in shards.items() for name in part}
    (copy / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    tokens = JanusPainter(copy).draw_tokens([OTHER])
    assert torch.equal(tokens, JanusPainter(folder).draw_tokens([OTHER]))


def _without_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.generation_head.vision_head.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def _as_a_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _cut_off(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:5000])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_without_a_weight, "lacks model.generation_head.vision_head.weight"),
        (_as_a_pickle, "can't be read as a Janus model"),
        (_cut_off, "can't be read as a Janus model"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "has no tokenizer.json"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "tokenizer that can't be read"),
        (lambda folder: (folder / "chat_template.jinja").unlink(), "has no chat template"),
        (
            lambda folder: change(folder / "tokenizer_config.json", lambda one: one.pop("pad_token")),
            "has no pad_token",
        ),
        (
            lambda folder: change(
                folder / "config.json", lambda one: one["vision_config"].update(num_image_tokens=60)
            ),
            "60 tokens .num_image_tokens., but 8 x 8 patches",
        ),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
    ],
    ids=[
        "a weight", "a pickle", "cut off", "no tokenizer", "another tokenizer", "no template", "no padding",
        "tokens", "no JSON",
    ],
)  # fmt: skip
def test_a_folder_that_is_not_whole_says_so(
    copy: Path, spoil: Callable[[Path], object], message: str
) -> None:
    spoil(copy)
    with pytest.raises(CheckpointError, match=message):
        open_painter(copy)


def test_wrong_orders_are_refused(painter: JanusPainter) -> None:
    for captions in ([], [" "], "a man"):
        with pytest.raises(InputError, match="caption"):
            painter.draw(captions)
    with pytest.raises(InputError, match="1 seeds for 2 images"):
        painter.draw([CAPTION, OTHER], seeds=[1])
    with pytest.raises(InputError, match="dtype is 'int8'"):
        JanusPainter(painter.folder, dtype="int8")
    with pytest.raises(InputError, match="larger budget"):
        painter.draw([CAPTION], cache=CacheSettings("adsa", 0.2))


def test_nothing_is_said_beside_errors(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    JanusPainter(folder).draw([OTHER], cache=CacheSettings("attention", 0.6))
    assert capfd.readouterr() == ("", "")


def test_the_checkpoint_is_the_same_each_time(folder: Path, tmp_path: Path) -> None:
    again = write_random_janus(tmp_path / "again")
    other = write_random_janus(tmp_path / "other", seed=1)
    for file in sorted(folder.iterdir()):
        same = file.read_bytes() == (again / file.name).read_bytes()
        assert same, file.name
        assert (file.read_bytes() == (other / file.name).read_bytes()) is (file.name != "model.safetensors")
    with pytest.raises(InputError, match="again"):
        write_random_janus(tmp_path / "again")
