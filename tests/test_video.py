"""A video on disk is the video in memory, its request included, and the same bytes each time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from proteus_deploy.errors import BackendError, InputError
from proteus_deploy.video import Video, read_frames, read_video

METADATA: dict[str, Any] = {"seed": 0, "request": {"prompt": 'a "café" in 日本, \udc80', "steps": 4}}


def _gradient(frames: int = 9, height: int = 64, width: int = 96) -> torch.Tensor:
    """A smooth picture that darkens over time, float32 [1, frames, 3, height, width]."""
    x = torch.linspace(0, 1, width).expand(height, width)
    y = torch.linspace(0, 1, height)[:, None].expand(height, width)
    picture = torch.stack([x, y, (x + y) / 2])
    fade = 1 - 0.05 * torch.arange(frames, dtype=torch.float32)
    return (picture[None] * fade[:, None, None, None])[None]


def _streams_of(path: Path) -> dict[str, Any]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        return {
            "codec": context.name,
            "pixels": context.pix_fmt,
            "size": (context.width, context.height),
            "frames": stream.frames,
            "rate": stream.average_rate,
            "colorspace": int(context.colorspace),
            "comment": container.metadata["comment"],
            "streams": len(container.streams),
        }


def test_saved_file_is_what_was_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "out.mp4"
    Video(_gradient(), 8, METADATA).save(path)
    found = _streams_of(path)
    assert json.loads(found.pop("comment")) == METADATA
    assert found == {
        "codec": "h264", "pixels": "yuv420p", "size": (96, 64), "frames": 9, "rate": 8, "colorspace": 1,
        "streams": 1,
    }  # fmt: skip
    assert [file.name for file in path.parent.iterdir()] == ["out.mp4"]


def test_index_stands_before_the_pictures(tmp_path: Path) -> None:
    """faststart: a browser can begin before the download ends."""
    path = tmp_path / "out.mp4"
    Video(_gradient(), 8).save(path)
    content = path.read_bytes()
    assert 0 < content.index(b"moov") < content.index(b"mdat")


def test_read_back_is_close_and_unbiased(tmp_path: Path) -> None:
    path = tmp_path / "out.mp4"
    video = Video(_gradient(), 8, METADATA)
    video.save(path)
    again = read_video(path)
    assert again.frames.shape == video.frames.shape
    assert again.frames.dtype == torch.float32
    assert again.metadata == METADATA
    error = again.frames - video.frames
    # Measured: RMS 0.0045, mean 0.004; a wrong colour matrix or range gives 0.03 and more.
    assert error.square().mean().sqrt() < 0.008
    assert error.mean((0, 1, 3, 4)).abs().max() < 0.006


@pytest.mark.parametrize("channel", [0, 1, 2])
def test_pure_colours_keep_their_channel(tmp_path: Path, channel: int) -> None:
    frames = torch.zeros(1, 3, 3, 32, 32)
    frames[:, :, channel] = 1
    Video(frames, 8).save(tmp_path / "out.mp4")
    assert (read_video(tmp_path / "out.mp4").frames - frames).abs().max() < 0.02


@pytest.mark.parametrize(("height", "width"), [(64, 96), (64, 64), (480, 720), (2, 2)])
def test_same_frames_give_the_same_bytes(tmp_path: Path, height: int, width: int) -> None:
    """These sizes differed from run to run before macroblock-tree rate control was switched off."""
    video = Video(_gradient(5, height, width), 8, METADATA)
    contents = set()
    for index in range(12):
        path = tmp_path / f"{index}.mp4"
        video.save(path)
        contents.add(path.read_bytes())
    assert len(contents) == 1


@pytest.mark.parametrize("fps", [1, 8, 12.5, 30, 24000 / 1001])
def test_frame_rate_is_kept(tmp_path: Path, fps: float) -> None:
    Video(_gradient(4), fps).save(tmp_path / "out.mp4")
    assert read_video(tmp_path / "out.mp4").fps == pytest.approx(fps, rel=1e-9)


def test_one_frame(tmp_path: Path) -> None:
    Video(_gradient(1), 8).save(tmp_path / "out.mp4")
    assert read_video(tmp_path / "out.mp4").frames.shape == (1, 1, 3, 64, 96)


def test_non_contiguous_frames_and_values_outside_the_range(tmp_path: Path) -> None:
    frames = (_gradient(width=192) * 3 - 1)[..., ::2]
    assert not frames.is_contiguous()
    Video(frames, 8).save(tmp_path / "a.mp4")
    Video(frames.clamp(0, 1).contiguous(), 8).save(tmp_path / "b.mp4")
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


@pytest.mark.parametrize("name", ["out.avi", "out", "out.mp4.txt"])
def test_other_suffix_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"written as \.mp4"):
        Video(_gradient(1), 8).save(tmp_path / name)


def test_odd_size_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"97x64.*save_frames"):
        Video(_gradient(1, 64, 97), 8).save(tmp_path / "out.mp4")


def test_metadata_that_is_not_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="metadata can't be written as JSON"):
        Video(_gradient(1), 8, {"photo": object()}).save(tmp_path / "out.mp4")


@pytest.mark.parametrize(
    ("frames", "fps", "message"),
    [
        (torch.zeros(4, 3, 8, 8), 8, r"shape \[4, 3, 8, 8\]"),
        (torch.zeros(2, 4, 3, 8, 8), 8, r"shape \[2, 4, 3, 8, 8\]"),
        (torch.zeros(1, 0, 3, 8, 8), 8, r"shape \[1, 0, 3, 8, 8\]"),
        (torch.zeros(1, 1, 3, 8, 8, dtype=torch.bfloat16), 8, "bfloat16"),
        (torch.full((1, 1, 3, 8, 8), float("nan")), 8, "NaN"),
        (torch.zeros(1, 1, 3, 8, 8), 0, "fps is 0"),
        (torch.zeros(1, 1, 3, 8, 8), float("inf"), "fps is inf"),
    ],
)
def test_impossible_videos_are_refused(frames: torch.Tensor, fps: float, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Video(frames, fps)


def test_missing_encoder_is_a_backend_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proteus_deploy.video._CODEC", "no_such_codec")
    with pytest.raises(BackendError, match="no no_such_codec encoder"):
        Video(_gradient(1), 8).save(tmp_path / "out.mp4")
    assert list(tmp_path.iterdir()) == []


def test_failure_midway_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.mp4"
    path.write_bytes(b"old")

    def fail(*_: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="No space left"):
        Video(_gradient(1), 8).save(path)
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["out.mp4"]


def test_save_frames_rounds_to_the_nearest_level(tmp_path: Path) -> None:
    frames = torch.full((1, 2, 3, 5, 7), 100.4 / 255)
    frames[0, 1] = 100.6 / 255
    paths = Video(frames, 8).save_frames(tmp_path / "frames")
    assert [path.name for path in paths] == ["frame_0000.png", "frame_0001.png"]
    for path, level in zip(paths, (100, 101), strict=True):
        with Image.open(path) as image:
            assert image.mode == "RGB"
            assert np.array_equal(np.asarray(image), np.full((5, 7, 3), level, dtype=np.uint8))


def test_save_frames_refuses_a_used_folder(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(InputError, match="not empty"):
        Video(_gradient(1), 8).save_frames(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("keep", [0.0, 0.004, 0.1, 0.5, 0.9])
def test_truncated_file_is_refused(tmp_path: Path, keep: float) -> None:
    path = tmp_path / "out.mp4"
    Video(_gradient(), 8, METADATA).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(InputError, match=r"out\.mp4"):
        read_video(path)


def test_foreign_and_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a file"):
        read_video(tmp_path / "absent.mp4")
    with pytest.raises(InputError, match="is not a file"):
        read_video(tmp_path)
    (tmp_path / "text.mp4").write_text("hello", encoding="utf-8")
    with pytest.raises(InputError, match="can't be read as a video"):
        read_video(tmp_path / "text.mp4")


def test_the_first_frames_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What follows isn't decoded, so a long file costs no more than what is read of it."""
    frames = torch.rand(1, 6, 3, 32, 48)
    Video(frames, 8).save(tmp_path / "long.mp4")
    whole = (read_video(tmp_path / "long.mp4").frames[0].permute(0, 2, 3, 1) * 255).round().to(torch.uint8)
    monkeypatch.setattr("proteus_deploy.video._MAX_DECODED_BYTES", 3 * 3 * 4 * 32 * 48)
    found = read_frames(tmp_path / "long.mp4", 3)
    assert found.dtype == torch.uint8
    assert torch.equal(found, whole[:3])
    with pytest.raises(InputError, match="cut or shrink it"):
        read_frames(tmp_path / "long.mp4", 4)
    monkeypatch.undo()
    assert len(read_frames(tmp_path / "long.mp4", 99)) == 6


def test_too_large_is_refused_before_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.mp4"
    Video(_gradient(), 8).save(path)
    monkeypatch.setattr("proteus_deploy.video._MAX_DECODED_BYTES", 4 * 96 * 64 * 12)
    with pytest.raises(InputError, match="cut or shrink"):
        read_video(path)
    monkeypatch.setattr("proteus_deploy.video._MAX_FILE_BYTES", 100)
    with pytest.raises(InputError, match="videos up to 100 bytes"):
        read_video(path)


def test_foreign_comment_is_no_metadata(tmp_path: Path) -> None:
    path = tmp_path / "foreign.mp4"
    for comment in ("made by hand", "[1, 2]"):
        with av.open(str(path), "w") as container:
            container.metadata["comment"] = comment
            stream = container.add_stream("libx264", rate=8)
            stream.width, stream.height, stream.pix_fmt = 16, 16, "yuv420p"
            picture = av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24")
            container.mux(stream.encode(picture))
            container.mux(stream.encode())
        assert read_video(path).metadata == {}
