"""Portrait checkpoints: opened, drawn with, and what is said of ones that aren't whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from proteus_deploy.errors import CheckpointError, InputError
from proteus_deploy.pickle_conversion import convert
from proteus_deploy.portrait.checkpoint import DOCUMENT, PortraitCheckpoint
from proteus_deploy.portrait.opening import open_painter
from proteus_deploy.portrait.painter import TorchPainter
from proteus_deploy.portrait.plan import POLICIES, CacheSettings
from proteus_deploy.portrait.sampling import Sampling
from proteus_deploy.tiny.portrait_checkpoint import write_random_portrait

CAPTION = "a woman with long red hair in a green hoodie in a grey room"


@pytest.fixture
def copy(portrait_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(portrait_folder, tmp_path / "copy"))


def change(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    file = folder / DOCUMENT
    document = json.loads(file.read_text())
    edit(document)
    file.write_text(json.dumps(document))


def _names(name: str, ending: str, document: dict[str, Any]) -> None:
    document[f"{name}_file"] = name + ending


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_draws(painter: TorchPainter, policy: str) -> None:
    cache = CacheSettings(policy, 1.0 if policy == "dense" else 0.7)
    pictures = painter.draw([CAPTION, "a man"], cache=cache)
    assert [picture.shape for picture in pictures] == [(16, 16, 3)] * 2
    assert all(picture.dtype == np.uint8 for picture in pictures)
    assert all(picture.std() > 1 for picture in pictures)


def test_the_same_seed_draws_the_same(painter: TorchPainter, portrait_folder: Path) -> None:
    first = painter.draw([CAPTION], sampling=Sampling(seed=4))[0]
    again = open_painter(portrait_folder).draw([CAPTION], sampling=Sampling(seed=4))[0]
    other = painter.draw([CAPTION], sampling=Sampling(seed=5))[0]
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_what_the_folder_says_is_the_default(painter: TorchPainter) -> None:
    assert painter.sampling == Sampling(guidance_scale=2.0, top_k=0)
    assert painter.cache == CacheSettings("adsa", 0.7)
    told = painter.draw_tokens([CAPTION], sampling=painter.sampling, cache=painter.cache)
    assert torch.equal(painter.draw_tokens([CAPTION]), told)


def test_captions_are_encoded_one_by_one(painter: TorchPainter) -> None:
    features, valid = painter.captions([CAPTION, "a man"])
    alone, own = painter.captions(["  A MAN "])
    assert torch.equal(features[1], alone[0])
    assert torch.equal(valid[1], own[0])
    count = int(own.sum())
    assert own[0, -count:].all()
    assert alone[0, :-count].eq(0).all()


def test_the_published_pickles_load(portrait_folder: Path, tmp_path: Path) -> None:
    """As the authors write them: wrapped, and the tokenizer with a tally of its training."""
    folder = tmp_path / "published"
    folder.mkdir()
    shutil.copyfile(portrait_folder / DOCUMENT, folder / DOCUMENT)
    for name, wrapper in (("gpt", "module"), ("vq", "model")):
        weights = load_file(portrait_folder / f"{name}.safetensors")
        if name == "vq":
            weights["quantize.codebook_used"] = torch.zeros(65536)
        torch.save({wrapper: weights, "steps": 3}, folder / f"{name}.pt")
        change(folder, partial(_names, name, ".pt"))
    with pytest.raises(CheckpointError, match=r"gpt\.pt is no \.safetensors file.*proteus-deploy convert"):
        TorchPainter.open(folder)
    for name in ("gpt", "vq"):
        convert(folder / f"{name}.pt")
        change(folder, partial(_names, name, ".safetensors"))
    want = TorchPainter.open(portrait_folder).draw_tokens([CAPTION])
    assert torch.equal(TorchPainter.open(folder).draw_tokens([CAPTION]), want)


def test_published_sizes_by_name(copy: Path) -> None:
    def published(document: dict[str, Any]) -> None:
        document["gpt"] = {"size": "GPT-XL", "model_type": "t2i", "cls_token_num": 120, "block_size": 1024}
        document["vq"] = {"size": "VQ-16"}

    change(copy, published)
    checkpoint = PortraitCheckpoint.open(copy)
    assert (checkpoint.gpt.n_layer, checkpoint.gpt.n_head, checkpoint.gpt.dim) == (36, 20, 1280)
    assert checkpoint.gpt.caption_dim == 2048
    assert checkpoint.side == 512
    with pytest.raises(CheckpointError, match="does not fit Gpt"):
        checkpoint.build_gpt()


def test_half_precision_draws_too(portrait_folder: Path) -> None:
    painter = TorchPainter.open(portrait_folder, dtype="bfloat16")
    assert painter.gpt.rotary.dtype == torch.float32
    assert painter.draw([CAPTION])[0].shape == (16, 16, 3)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"dtype": "float64"}, "dtype is 'float64'; choose float32, bfloat16, float16"),
        ({"dtype": "half precision"}, "dtype is 'half precision'"),
        ({"kernel": "cuda"}, "kernel is 'cuda'; choose torch or triton"),
    ],
)
def test_options_that_are_refused(portrait_folder: Path, option: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TorchPainter.open(portrait_folder, **option)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d.pop("gpt"), r"gpt is None; an object belongs there"),
        (lambda d: d["gpt"].update(depth=3), r"GptConfig has no depth; it has block_size, "),
        (lambda d: d["gpt"].update(size="GPT-M"), r"no decoder of size 'GPT-M'; choose GPT-B"),
        (lambda d: d["vq"].update(size="VQ-4"), r"no tokenizer of size 'VQ-4'; choose VQ-8, VQ-16"),
        (lambda d: d["vq"].update(codebook_size=64), r"decoder knows 96 codes .* and the tokenizer 64"),
        (lambda d: d.update(gpt_file="x.safetensors"), r"gpt_file is x.safetensors, but .* does not exist"),
        (lambda d: d.update(vq_file=None), r"vq_file is None; the name of a file belongs there"),
        (lambda d: d.update(taste=1), r"has taste; it may have cache, gpt"),
        (lambda d: d["sampling"].update(top_p=3), r"top_p is 3"),
        (lambda d: d["sampling"].update(heat=3), r"heat"),
        (lambda d: d["cache"].update(budget=0), r"budget is 0"),
    ],
)
def test_what_is_wrong_is_named(copy: Path, edit: Callable[[dict[str, Any]], object], message: str) -> None:
    change(copy, edit)
    with pytest.raises(CheckpointError, match=message):
        PortraitCheckpoint.open(copy)


def test_a_folder_without_the_document(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no portrait.json; a portrait checkpoint is a folder"):
        PortraitCheckpoint.open(tmp_path)


def test_an_encoder_of_another_width(copy: Path) -> None:
    def wide(document: dict[str, Any]) -> None:
        document["gpt"]["caption_dim"] = 64

    change(copy, wide)
    weights = load_file(copy / "gpt.safetensors")
    weights["cls_embedding.uncond_embedding"] = weights["cls_embedding.uncond_embedding"][:, :64].contiguous()
    weights["cls_embedding.cap_proj.fc1.weight"] = weights["cls_embedding.cap_proj.fc1.weight"][
        :, :64
    ].contiguous()
    save_file(weights, copy / "gpt.safetensors")
    with pytest.raises(CheckpointError, match=r"t5 encoder, 128 wide, but .* a t5's, 64 wide"):
        TorchPainter.open(copy).draw([CAPTION])


def test_classes_have_no_captions(copy: Path) -> None:
    change(copy, lambda document: document["gpt"].update(model_type="c2i", cls_token_num=1))
    with pytest.raises(CheckpointError, match=r"draws classes \(c2i\), not captions"):
        TorchPainter.open(copy)


@pytest.mark.parametrize(
    ("captions", "message"),
    [
        ([], "pass a list with at least one"),
        ("a man", "captions are 'a man'"),
        ([" "], "a caption is ' '; say who is to be drawn"),
        (["x" * 2001], "2001 characters; use at most 2000"),
    ],
)
def test_captions_that_are_refused(painter: TorchPainter, captions: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        painter.draw(captions)


def test_a_folder_that_is_there_stays(portrait_folder: Path) -> None:
    with pytest.raises(InputError):
        write_random_portrait(portrait_folder)
