from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from proteus_deploy.evaluate.perceptual_network import load_perceptual_network
from proteus_deploy.training.tiny_model import perceptual
from proteus_deploy.training.tiny_model.fitting import step_generator
from proteus_deploy.training.tiny_model.perceptual import train_perceptual_network

CLIPS = 8


@pytest.fixture(scope="module")
def drawn() -> tuple[np.ndarray, np.ndarray]:
    """Clips of a white head, 24 pixels wide and 36 high, on black; each clip has it elsewhere."""
    frames = np.zeros((CLIPS, 3, 96, 96, 3), dtype=np.uint8)
    parts = np.zeros((CLIPS, 3, 96, 96), dtype=np.uint8)
    for index in range(CLIPS):
        place = (index, slice(None), slice(20 + index, 56 + index), slice(30 + index, 54 + index))
        frames[place], parts[place] = 255, 3
    return frames, parts


def test_the_result_is_loaded_by_the_measures(
    drawn: tuple[np.ndarray, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(perceptual, "draw_clips", lambda *_, **__: drawn)
    monkeypatch.setattr(perceptual, "_BATCH", 4)
    path = train_perceptual_network(tmp_path, steps=2)
    assert path == tmp_path / "perceptual.safetensors"
    network = load_perceptual_network(path)
    assert [value.shape[1] for value in network(torch.zeros(1, 3, 96, 96))] == list(network.channels)
    tensors = load_file(path)
    assert {key.split(".")[0] for key in tensors} == {"stages"}
    assert sum(value.numel() for value in tensors.values()) < 400_000


def test_half_of_a_batch_is_whole_frames_and_half_is_heads(drawn: tuple[np.ndarray, np.ndarray]) -> None:
    frames, parts = drawn
    chosen = torch.arange(CLIPS)
    images, places = perceptual._batch(frames, parts, chosen, step_generator(0, 0))
    half = CLIPS // 2
    whole = torch.from_numpy(frames[:half, 0]).permute(0, 3, 1, 2).float() / 255
    torch.testing.assert_close(images[:half], whole, rtol=0, atol=1e-4)
    # A head of 24 of 96 pixels fills a quarter of a frame's width, and at least half of a crop's.
    assert places[:half, 2].tolist() == [0.25] * half
    assert (places[half:, 2] > 0.5).all()


def test_places_say_where_the_head_is(drawn: tuple[np.ndarray, np.ndarray]) -> None:
    images, places = perceptual._batch(*drawn, torch.arange(CLIPS), step_generator(0, 7))
    steps = (torch.arange(96) + 0.5) / 96
    for image, (x, _, width) in zip(images, places.tolist(), strict=True):
        bright = image[0] > 0.5
        row = bright[bright.any(dim=1).nonzero()[len(bright.any(dim=1).nonzero()) // 2, 0]]
        found = steps[row]
        if found.min() > 0.01 and found.max() < 0.99:  # all of it is in the crop
            assert found.mean().item() == pytest.approx(x, abs=0.02)
            assert row.float().mean().item() == pytest.approx(width, abs=0.03)


def test_an_empty_frame_has_its_head_everywhere() -> None:
    assert perceptual._head(np.zeros((8, 8), dtype=np.uint8)).tolist() == [0.5, 0.5, 1.0]


def test_every_weight_learns() -> None:
    network = perceptual._Trained()
    labels = torch.zeros(4, 13, dtype=torch.int64)
    loss, details = network.loss(torch.rand(4, 3, 96, 96), torch.rand(4, 3), labels)
    loss.backward()
    assert {"person", "scene", "place"} <= set(details)
    assert not [name for name, value in network.named_parameters() if value.grad is None]
