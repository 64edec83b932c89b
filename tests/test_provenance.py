"""The mark of a generated video: there, read back, harmless to players; what is no mp4 is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from proteus_deploy.errors import InputError
from proteus_deploy.provenance import GENERATED, mark_generated, source_type
from proteus_deploy.video import Video, read_video


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    frames = torch.rand(1, 5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    Video(frames, 8, {"seed": 3}).save(tmp_path / "video.mp4")
    return tmp_path / "video.mp4"


def test_marked_and_still_the_same_video(saved: Path) -> None:
    before, size = read_video(saved), saved.stat().st_size
    assert source_type(saved) is None
    mark_generated(saved)
    assert source_type(saved) == GENERATED
    after = read_video(saved)
    assert torch.equal(before.frames, after.frames)
    assert before.metadata == after.metadata
    assert b"proteus-deploy " in saved.read_bytes()[size:]
    with pytest.raises(InputError, match="is marked already"):
        mark_generated(saved)


def test_other_tools_read_it(saved: Path) -> None:
    """FFmpeg's own reader of the box finds the packet, so it lies where the format says."""
    import av

    mark_generated(saved)
    with av.open(str(saved), options={"export_xmp": "1"}) as container:
        assert GENERATED in container.metadata["xmp"]


def test_what_is_no_mp4(saved: Path, tmp_path: Path) -> None:
    whole = saved.read_bytes()
    for name, content in (
        ("cut", whole[:-1]),
        ("text", b"hello, this is text"),
        ("short", whole[:6]),
        ("empty", b""),
    ):
        path = tmp_path / f"{name}.mp4"
        path.write_bytes(content)
        with pytest.raises(InputError, match="is no whole mp4"):
            mark_generated(path)
        assert path.read_bytes() == content
