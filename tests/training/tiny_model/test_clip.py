from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from proteus_deploy.evaluate.clip_score import ClipEncoder
from proteus_deploy.training.tiny_model import clip
from proteus_deploy.training.tiny_model.clip import learn_merges, train_clip, write_clip_tokenizer
from proteus_deploy.training.tiny_model.descriptions import ATTRIBUTES, attribute_labels, describe_clip
from proteus_deploy.training.tiny_model.fitting import step_generator


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    frames = np.random.default_rng(0).integers(0, 256, (4, 17, 96, 96, 3), dtype=np.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clip, "draw_clips", lambda *_, **__: (frames, frames[..., 0]))
        patch.setattr(clip, "_BATCH", 3)
        return train_clip(tmp_path_factory.mktemp("clip"), steps=2)


def test_the_measure_loads_the_folder(folder: Path) -> None:
    encoder = ClipEncoder(folder)
    assert encoder.side == 64
    assert encoder.max_tokens == 77
    frames = np.random.default_rng(1).integers(0, 256, (2, 96, 96, 3), dtype=np.uint8)
    assert encoder.image_features(frames).shape == (2, 64)
    long = " ".join(["a woman with curly red hair"] * 40)
    assert encoder.text_features(long).shape == (1, 64)


def test_transformers_loads_the_folder(folder: Path) -> None:
    from transformers import AutoTokenizer, CLIPModel

    model = CLIPModel.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("a man", return_tensors="pt").input_ids
    config: Any = model.config.text_config
    assert ids[0, 0] == config.bos_token_id
    assert ids[0, -1] == config.eos_token_id
    # The library has another way to find the end token for this number, meant for old files.
    assert config.eos_token_id != 2
    assert sum(file.stat().st_size for file in folder.iterdir()) < 2.5e6


def test_padding_changes_no_text(folder: Path) -> None:
    from transformers import AutoTokenizer, CLIPModel

    model = CLIPModel.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    short = tokenizer(["a man"], return_tensors="pt").input_ids
    padded = tokenizer(
        ["a man", "a woman with a blond ponytail"], padding=True, return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        alone = model.text_model(input_ids=short).pooler_output[0]
        beside = model.text_model(input_ids=padded).pooler_output[0]
    torch.testing.assert_close(alone, beside, rtol=1e-4, atol=1e-5)


def test_the_files_are_half_precision_without_heads(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    assert {value.dtype for value in tensors.values()} == {torch.float16}
    assert not [key for key in tensors if key.startswith("of_")]


def test_merges_come_by_frequency_then_letters() -> None:
    merges = learn_merges({"aab": 3, "ab": 1, "cd": 4}, 10)
    # "a" + "b</w>" and "c" + "d</w>" occur four times each.
    assert merges == [("a", "b</w>"), ("c", "d</w>"), ("a", "ab</w>")]
    assert learn_merges({"cd": 4, "ab": 1, "aab": 3}, 2) == merges[:2]


def test_words_of_prompts_are_few_tokens(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    write_clip_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    lengths = [len(tokenizer(describe_clip(seed, 0).prompt).input_ids) for seed in range(1000, 1100)]
    assert max(lengths) <= 45
    assert tokenizer.unk_token_id not in tokenizer("Zürich 42 ☃!").input_ids[1:-1]


def test_the_tokenizer_has_the_same_bytes_every_time(folder: Path, tmp_path: Path) -> None:
    write_clip_tokenizer(tmp_path)
    for file in tmp_path.iterdir():
        assert file.read_bytes() == (folder / file.name).read_bytes(), file.name


@pytest.mark.parametrize("step", range(6))
def test_a_recoloured_prompt_differs_in_one_label(step: int) -> None:
    before = describe_clip(1000 + step, 0)
    after = clip._recoloured(before, step_generator(0, step))
    labels, changed = attribute_labels(before), attribute_labels(after)
    different = [name for name in ATTRIBUTES if labels[name] != changed[name]]
    assert len(different) == 1
    assert different[0] in ("clothes", "background", "hair colour")
    assert before.prompt != after.prompt


def test_the_loss_asks_for_the_own_prompt() -> None:
    network = clip._Trained(50)
    pixels = torch.randn(3, 3, 64, 64)
    ids = torch.randint(0, 48, (6, 9))
    ids[:, -1] = 49
    labels = torch.zeros(3, 13, dtype=torch.int64)
    loss, details = network.loss(pixels, ids, labels, labels)
    loss.backward()
    assert 0 <= details["over_recoloured"] <= 1
    assert network.clip.logit_scale.grad is not None
    unused = [name for name, value in network.named_parameters() if value.grad is None]
    assert not unused


def test_frames_keep_red_first() -> None:
    frames = np.zeros((1, 2, 96, 96, 3), dtype=np.uint8)
    frames[..., 0] = 255
    pixels = clip._pixels(frames, torch.tensor([0]), step_generator(0, 3))
    red, green, blue = pixels.mean(dim=(0, 2, 3)).tolist()
    assert red > 1.5
    assert max(green, blue) < -1
