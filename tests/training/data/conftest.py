"""A folder of small clips, good and bad ones, and the tiny checkpoint's networks, made once."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from proteus_deploy.training.avatars import make_clip, make_photo, training_seed
from proteus_deploy.training.data.cache import PreparedSet
from proteus_deploy.training.data.folder import FolderClips
from proteus_deploy.training.data.networks import EncodingNetworks
from proteus_deploy.training.data.prepare import prepare
from proteus_deploy.training.data.video_frames import VideoOptions
from proteus_deploy.video import Video

GOOD = (*(f"good {index}" for index in range(7)), "no masks")


@pytest.fixture(scope="session")
def networks(tiny_checkpoint: Path) -> EncodingNetworks:
    return EncodingNetworks(tiny_checkpoint)


@pytest.fixture(scope="session")
def write_video() -> Callable[[Path, NDArray[np.uint8]], Path]:
    """write_video(path, frames uint8 [F, H, W, 3]) -> path, an mp4 of 8 frames a second."""

    def write(path: Path, frames: NDArray[np.uint8]) -> Path:
        Video(torch.from_numpy(frames).permute(0, 3, 1, 2)[None].float() / 255, 8).save(path)
        return path

    return write


@pytest.fixture(scope="session")
def small_options() -> VideoOptions:
    """Nine frames of 64x64, every one, out of fourteen; the drawn faces score below the published 0.9."""
    return VideoOptions(
        num_frames=9,
        height=64,
        width=64,
        frame_stride=1,
        skip_start=1,
        skip_end=1,
        references=1,
        min_confidence=0.5,
        faces_looked_at=1,
    )


@pytest.fixture(scope="session")
def clips_folder(
    tmp_path_factory: pytest.TempPathFactory, write_video: Callable[[Path, NDArray[np.uint8]], Path]
) -> Path:
    """A dozen clips: eight good ones, and one each without a face, cut short, without caption, of two."""
    folder = tmp_path_factory.mktemp("clips")
    seed = training_seed(0)
    clip = make_clip(seed, 0, motion="talk", num_frames=14, size=160)
    good = write_video(folder / "good 0.mp4", clip.frames)
    Image.fromarray(make_photo(seed, 1, 256).image).save(folder / "good 1.reference.png")
    for name in GOOD[1:]:
        shutil.copyfile(good, folder / f"{name}.mp4")
        if name not in ("good 1", "no masks"):
            shutil.copyfile(folder / "good 1.reference.png", folder / f"{name}.reference.png")
    for name in GOOD[:-1]:
        np.savez_compressed(
            folder / f"{name}.masks.npz", person=clip.person_mask, head=clip.head_mask, face=clip.face_mask
        )
    rng = np.random.default_rng(0)
    wall = np.broadcast_to(rng.integers(0, 255, (14, 1, 160, 3), dtype=np.uint8), (14, 160, 160, 3))
    write_video(folder / "faceless.mp4", np.ascontiguousarray(wall))
    two = [clip.frames, make_clip(training_seed(1), 0, motion="nod", num_frames=14, size=160).frames]
    write_video(folder / "two people.mp4", np.concatenate(two, axis=2))
    shutil.copyfile(good, folder / "no caption.mp4")
    (folder / "cut short.mp4").write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    for name in (*GOOD, "faceless", "two people", "cut short"):
        (folder / f"{name}.txt").write_text(f"{clip.prompt} in {name}", encoding="utf-8")
    for name in (*GOOD, "faceless", "two people", "cut short", "no caption"):
        (folder / f"{name}.identity.txt").write_text("a woman", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def prepared(
    clips_folder: Path,
    small_options: VideoOptions,
    networks: EncodingNetworks,
    tmp_path_factory: pytest.TempPathFactory,
) -> PreparedSet:
    """The clips folder, encoded once with the default settings. Read it, don't write into it."""
    source = FolderClips(clips_folder, small_options)
    return prepare(source, networks, tmp_path_factory.mktemp("cache"))
