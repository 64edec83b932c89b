"""Which frames of a video are taken, and what becomes of them; a damaged video is an answer, not a crash."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from proteus_deploy.errors import InputError
from proteus_deploy.training.data.report import ClipRejected, Reason
from proteus_deploy.training.data.video_frames import (
    SizePlan,
    VideoOptions,
    choose_frames,
    decode_frames,
    spread,
    video_facts,
)

PLAIN = VideoOptions(num_frames=5, height=16, width=32, frame_stride=3, skip_start=7, skip_end=7)


def options(**changes: object) -> VideoOptions:
    return VideoOptions(**{**PLAIN.__dict__, **changes})


def test_the_defaults_are_the_published_ones() -> None:
    chosen = choose_frames(159, 24, VideoOptions(), random.Random(0))
    assert chosen.clip == tuple(range(7, 152, 3))
    assert len(chosen.clip) == 49
    assert chosen.outside == ()
    with pytest.raises(ClipRejected, match=r"158 frames; 49 of them, 7 skipped in front and 7 .* take 159"):
        choose_frames(158, 24, VideoOptions(), random.Random(0))


def test_positions() -> None:
    # 40 frames less 14 leave 7..32; the clip spans 13 of these 26.
    centre = choose_frames(40, 24, PLAIN, random.Random(0))
    assert centre.clip == (13, 16, 19, 22, 25)
    assert centre.outside == (*range(7, 13), *range(26, 33))
    start = choose_frames(40, 24, options(position="start"), random.Random(0))
    assert start.clip[0] == 7
    assert start.outside == tuple(range(20, 33))
    starts = {
        choose_frames(40, 24, options(position="random"), random.Random(seed)).clip[0] for seed in range(200)
    }
    assert starts == set(range(7, 21))


def test_a_rate_in_place_of_the_stride() -> None:
    chosen = choose_frames(40, 25, options(fps=8, position="start"), random.Random(0))
    assert chosen.clip == (7, 10, 13, 16, 19)  # 25/8 = 3.125: 0, 3.1, 6.2, 9.4, 12.5 (to the even one)
    assert choose_frames(60, 30, options(fps=7.5, position="start"), random.Random(0)).clip[-1] == 7 + 16
    with pytest.raises(ClipRejected, match="6 frames a second and the clip 8") as caught:
        choose_frames(400, 6, options(fps=8), random.Random(0))
    assert caught.value.reason == Reason.TOO_FEW_FRAMES


def test_spread() -> None:
    assert spread(range(10), 3) == [1, 5, 8]
    assert spread(range(10), 1) == [5]
    assert spread([4, 9], 5) == [4, 9]
    assert spread([], 2) == []


def test_frames_cover_the_clip_and_are_cut_in_the_middle() -> None:
    image = np.zeros((64, 64, 3), np.uint8)
    image[16:48] = 255  # the middle half: what 16 x 32 out of 32 x 32 keeps
    plan = SizePlan.make((64, 64), PLAIN, random.Random(0))
    assert (plan.scaled, plan.top, plan.left) == ((32, 32), 8, 0)
    assert plan.frame(image).shape == (16, 32, 3)
    assert plan.frame(image).min() == 255
    assert plan.mask(image[:, :, 0]).all()
    assert plan.mask(image[:, :, 0]).dtype == bool
    assert not plan.mask(255 - image[:, :, 0]).any()
    tops = {SizePlan.make((64, 64), options(crop="random"), random.Random(seed)).top for seed in range(100)}
    assert tops == set(range(17))


def test_frames_and_masks_are_averaged_when_shrunk() -> None:
    stripes = np.zeros((64, 128, 3), np.uint8)
    stripes[:, ::2] = 200
    plan = SizePlan.make((64, 128), PLAIN, random.Random(0))
    assert (plan.frame(stripes) == 100).all()
    inside = np.zeros((64, 128), bool)
    inside[:, ::4] = True  # a quarter of each pixel
    assert not plan.mask(inside).any()
    inside[:, 1::4] = True
    assert plan.mask(inside).all()


def test_too_small() -> None:
    with pytest.raises(ClipRejected, match="31x16 pixels and the clip 32x16") as caught:
        SizePlan.make((16, 31), PLAIN, random.Random(0))
    assert caught.value.reason == Reason.TOO_SMALL
    plan = SizePlan.make((8, 8), options(allow_enlarging=True), random.Random(0))
    assert plan.frame(np.full((8, 8, 3), 9, np.uint8)).shape == (16, 32, 3)


@pytest.fixture(scope="module")
def video(
    tmp_path_factory: pytest.TempPathFactory, write_video: Callable[[Path, NDArray[np.uint8]], Path]
) -> tuple[Path, NDArray[np.uint8]]:
    """Twelve frames, each of one grey that says its number, the left half darker."""
    frames = np.empty((12, 32, 64, 3), np.uint8)
    frames[:] = (40 + 15 * np.arange(12, dtype=np.uint8))[:, None, None, None]
    frames[:, :, :32] -= 30
    return write_video(tmp_path_factory.mktemp("video") / "grey.mp4", frames), frames


def test_the_wanted_frames_are_decoded(video: tuple[Path, NDArray[np.uint8]]) -> None:
    path, frames = video
    assert video_facts(path) == video_facts(path.read_bytes()) == (12, 8.0)
    for source in (path, path.read_bytes()):
        decoded = dict(decode_frames(source, [9, 2, 3]))
        assert list(decoded) == [2, 3, 9]
        for index, picture in decoded.items():
            assert np.abs(picture.astype(int) - frames[index]).mean() < 2, index


def test_upright_videos_of_phones(video: tuple[Path, NDArray[np.uint8]]) -> None:
    """Stored lying with "turn by 90 degrees clockwise to show": the dark left half comes to the top."""
    content = bytearray(video[0].read_bytes())
    straight = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    turned = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    position = content.index(straight, content.index(b"tkhd"))
    content[position : position + len(turned)] = turned
    _, picture = next(decode_frames(bytes(content), [0]))
    assert picture.shape == (64, 32, 3)
    assert picture[:30].mean() < picture[34:].mean() - 20


def _read_all(source: Path | bytes) -> None:
    count, _ = video_facts(source)
    list(decode_frames(source, range(count)))


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "middle"])
def test_damaged_videos(damage: str, video: tuple[Path, NDArray[np.uint8]], tmp_path: Path) -> None:
    content = video[0].read_bytes()
    damaged = {
        "cut": content[:-200],
        "empty": b"",
        "text": b"no video at all" * 100,
        "middle": content[: content.index(b"mdat") + 4]
        + b"\xff" * (len(content) - content.index(b"mdat") - 4),
    }[damage]
    path = tmp_path / "damaged.mp4"
    path.write_bytes(damaged)
    for source in (path, damaged):
        with pytest.raises(ClipRejected) as caught:
            _read_all(source)
        assert caught.value.reason == Reason.UNREADABLE_VIDEO
        assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_frames", 0),
        ("frame_stride", 0),
        ("skip_end", -1),
        ("fps", 0),
        ("min_confidence", 1.5),
        ("crop", "no"),
    ],
)
def test_wrong_options(field: str, value: object) -> None:
    with pytest.raises(InputError, match=field):
        options(**{field: value})
