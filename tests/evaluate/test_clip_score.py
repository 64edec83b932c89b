"""CLIPScore against transformers' own path, its published defects, and temporal consistency."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from proteus_deploy.errors import CheckpointError, InputError
from proteus_deploy.evaluate.clip_score import ClipEncoder, clip_score, score_features, temporal_consistency
from proteus_deploy.testing import Tolerance, assert_close

FLOAT32 = Tolerance(1e-4, "absolute", "float32 networks, scores up to 100; another seed differs by several")
PROMPT = "A man waves."


@pytest.fixture(scope="module")
def encoder(clip_folder: Path) -> ClipEncoder:
    return ClipEncoder(clip_folder)


def clip(count: int, height: int = 40, width: int = 52) -> NDArray[np.uint8]:
    """Smooth pictures of changing colours: noise would be grey after shrinking."""
    generator = np.random.default_rng(4)
    corners = generator.integers(0, 256, (count, 2, 2, 3)).astype(np.float64)
    down, across = np.linspace(0, 1, height)[:, None, None], np.linspace(0, 1, width)[:, None]
    top = corners[:, None, None, 0, 0] * (1 - across) + corners[:, None, None, 0, 1] * across
    bottom = corners[:, None, None, 1, 0] * (1 - across) + corners[:, None, None, 1, 1] * across
    return (top * (1 - down) + bottom * down).astype(np.uint8)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (40, 53), (71, 33), (20, 25), (37, 200)])
def test_frames_are_prepared_as_clip_prepares_images(encoder: ClipEncoder, height: int, width: int) -> None:
    from transformers import CLIPImageProcessorPil

    frames = np.random.default_rng(height).integers(0, 256, (2, height, width, 3), dtype=np.uint8)
    processor: Any = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    expected = processor(images=list(frames), return_tensors="pt")["pixel_values"]
    assert_close(
        "pixels", encoder.prepare(frames), expected, Tolerance(1e-5, "absolute", "one float32 scaling")
    )


def test_the_score_is_transformers_cosine_times_100(encoder: ClipEncoder, clip_folder: Path) -> None:
    """`logits_per_image` with the temperature at which the public model stopped, 100."""
    from transformers import CLIPModel

    frames = clip(17)
    model: Any = CLIPModel.from_pretrained(clip_folder, local_files_only=True)
    model.eval()
    with torch.no_grad():
        tokens = encoder._tokenizer([PROMPT], return_tensors="pt")
        outputs = model(**tokens, pixel_values=encoder.prepare(frames[:16]))
        expected = (outputs.logits_per_image / model.logit_scale.exp() * 100).mean()
    score = clip_score(frames, PROMPT, encoder)
    assert_close("score", score, expected, FLOAT32)
    assert abs(score - clip_score(frames, "a dog, zzz", encoder)) > 1, "the prompt matters"
    assert_close(
        "features", score_features(encoder.image_features(frames[:16]), PROMPT, encoder), score, FLOAT32
    )


def test_the_last_of_17_frames_is_not_looked_at(encoder: ClipEncoder) -> None:
    frames = clip(17)
    score = clip_score(frames, PROMPT, encoder)
    frames[16] = 0
    assert clip_score(frames, PROMPT, encoder) == score
    frames[15] = 0
    assert clip_score(frames, PROMPT, encoder) != score


def test_as_published_the_network_sees_blue_first(encoder: ClipEncoder) -> None:
    frames = clip(16)
    published = clip_score(frames, PROMPT, encoder, as_published=True)
    assert abs(published - clip_score(frames, PROMPT, encoder)) > 0.1
    swapped = np.ascontiguousarray(frames[..., ::-1])
    assert published == clip_score(swapped, PROMPT, encoder)
    grey = np.repeat(frames[..., :1], 3, axis=3)
    assert clip_score(grey, PROMPT, encoder, as_published=True) == clip_score(grey, PROMPT, encoder)


def test_a_prompt_is_cut_off_after_77_tokens(encoder: ClipEncoder) -> None:
    """One start token, 75 letters of the prompt, one end token."""
    assert encoder.max_tokens == 77
    cut = encoder.text_features("a " * 75)
    assert (encoder.text_features("a " * 75 + "man waves") == cut).all()
    assert (encoder.text_features("a " * 74 + "man waves") != cut).any()


def test_temporal_consistency_is_the_mean_cosine_of_neighbours(encoder: ClipEncoder) -> None:
    features = np.array([[1, 0], [0, 1], [0, 1], [0.6, 0.8]], np.float32)
    assert_close("by hand", temporal_consistency(features), (0 + 1 + 0.8) / 3, FLOAT32)
    still = encoder.image_features(np.repeat(clip(1), 3, axis=0))
    assert_close("a still picture", temporal_consistency(still), 1.0, FLOAT32)
    moving = clip(3)
    assert temporal_consistency(encoder.image_features(moving)) < 0.999
    with pytest.raises(InputError, match="one frame"):
        temporal_consistency(features[:1])


def test_the_folder_says_how_pixels_are_normalised(clip_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(clip_folder, tmp_path / "clip")
    settings = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.25, 0.5]}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    pixels = ClipEncoder(folder).prepare(np.full((1, 32, 32, 3), 255, np.uint8))
    assert pixels[0, :, 0, 0].tolist() == [1.0, 2.0, 1.0]
    (folder / "preprocessor_config.json").write_text('{"image_mean": 0.5}')
    with pytest.raises(CheckpointError, match="three numbers each"):
        ClipEncoder(folder)


def test_counters_of_older_files_are_no_weights(
    clip_folder: Path, tmp_path: Path, encoder: ClipEncoder
) -> None:
    folder = shutil.copytree(clip_folder, tmp_path / "clip")
    weights = load_file(folder / "model.safetensors")
    positions = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    save_file(weights | positions, folder / "model.safetensors")
    found = ClipEncoder(folder).text_features(PROMPT)
    # Tensors start at other addresses of the file, for which other vector instructions are taken.
    assert_close(
        "text", found, encoder.text_features(PROMPT), Tolerance(1e-6, "absolute", "float32 sums reordered")
    )


def test_folders_that_are_no_clip_are_refused(clip_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(clip_folder, tmp_path / "clip")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors does not exist"):
        ClipEncoder(folder)
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(
        CheckpointError,
        match=r"are not loaded.*proteus-deploy convert .*pytorch_model\.bin --output .*model\.safetensors",
    ):
        ClipEncoder(folder)
    del weights["visual_projection.weight"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing: visual_projection\.weight"):
        ClipEncoder(folder)
    (folder / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(CheckpointError, match="for a 'bert' model; expected 'clip'"):
        ClipEncoder(folder)


def test_a_missing_tokenizer_is_named(clip_folder: Path, tmp_path: Path) -> None:
    """The library would make an empty one, for which all prompts are alike."""
    folder = shutil.copytree(
        clip_folder, tmp_path / "clip", ignore=shutil.ignore_patterns("vocab.json", "merges.txt")
    )
    with pytest.raises(CheckpointError, match=r"no tokenizer; copy tokenizer\.json"):
        ClipEncoder(folder)


def test_a_damaged_or_foreign_tokenizer_is_refused(clip_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(clip_folder, tmp_path / "clip")
    vocabulary = json.loads((folder / "vocab.json").read_text())
    (folder / "vocab.json").write_text(json.dumps(vocabulary | {"zebra</w>": 99}))
    with pytest.raises(CheckpointError, match=r"tokens up to 99, and the network has 58"):
        ClipEncoder(folder)
    (folder / "vocab.json").write_text("{")
    with pytest.raises(CheckpointError, match="tokenizer that can't be read"):
        ClipEncoder(folder)
