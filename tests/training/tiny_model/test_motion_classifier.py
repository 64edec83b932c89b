from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from proteus_deploy.training.avatars import MOTIONS, make_clip
from proteus_deploy.training.tiny_model import motion_classifier as module
from proteus_deploy.training.tiny_model.motion_classifier import motion_features, train_motion_classifier

SHORT = replace(module._SETTINGS, steps=40, warmup=5)


@pytest.fixture(scope="module")
def pattern() -> np.ndarray:
    noise = np.random.default_rng(0).integers(0, 256, (16, 24, 3)).astype(np.float32)
    from cv2 import INTER_CUBIC, resize

    return np.clip(resize(noise, (144, 96), interpolation=INTER_CUBIC), 0, 255).astype(np.uint8)


def test_nothing_moves_in_a_still_picture(pattern: np.ndarray) -> None:
    assert not motion_features(np.stack([pattern[:, :96]] * 5)).any()


def test_a_pan_is_flow_to_one_side_in_all_cells(pattern: np.ndarray) -> None:
    right = motion_features(np.stack([pattern[:, 40 - 2 * k : 136 - 2 * k] for k in range(5)]))
    across, down, spread = right[0], right[1], right[2]
    # Two pixels a frame of 96, under the square root.
    assert np.median(across) == pytest.approx((2 / 96) ** 0.5, rel=0.1)
    assert np.abs(np.median(down)) < 0.1 * np.median(across)
    assert np.median(spread) < 0.3 * np.median(across)
    left = motion_features(np.stack([pattern[:, 20 + 2 * k : 116 + 2 * k] for k in range(5)]))
    assert np.median(left[0]) == pytest.approx(-np.median(across), rel=0.1)


def test_shimmer_is_noise_of_its_own_in_each_frame(pattern: np.ndarray) -> None:
    grey = np.full((4, 96, 96, 3), 128, np.uint8)
    seen = module._shimmering(grey, 6.0, seed=3)
    assert np.array_equal(seen, module._shimmering(grey, 6.0, seed=3))
    assert not np.array_equal(seen, module._shimmering(grey, 6.0, seed=4))
    assert seen.dtype == np.uint8
    assert (seen - 128.0).std() == pytest.approx(6, rel=0.05)
    assert not np.array_equal(seen[0], seen[1])
    # Smooth: neighbouring pixels are alike.
    assert np.abs(np.diff(seen[0].astype(float), axis=1)).mean() < 3
    assert module._shimmering(grey, 0.0, seed=3) is grey
    # It moves nothing on average, and something everywhere.
    features = motion_features(module._shimmering(np.stack([pattern[:, :96]] * 17), 6.0, seed=0))
    assert np.abs(features[0]).mean() < 0.6 * features[5].mean()


def test_it_learns_to_tell_clips_apart_and_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = ["walk by", "still"]
    clips = [make_clip(1000 + index, 0, motion=kinds[index % 2]) for index in range(8)]
    frames = np.stack([clip.frames for clip in clips])
    labels = torch.tensor([list(MOTIONS).index(clip.motion) for clip in clips])
    network = train_motion_classifier(tmp_path, frames, labels, settings=SHORT)
    other = [make_clip(2000 + index, 0, motion=kinds[index % 2]) for index in range(4)]
    assert [network.classify(clip.frames) for clip in other] == [clip.motion for clip in other]
    monkeypatch.setattr(module, "motion_features", lambda _: pytest.fail("flow was computed again"))
    again = train_motion_classifier(tmp_path, frames, labels, settings=SHORT)
    for one, same in zip(network.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, same)
