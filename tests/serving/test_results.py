"""Results are whole or absent, and what nobody published is swept away."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from proteus_deploy.errors import InputError
from proteus_deploy.serving.jobs import Claim, JobNotFound
from proteus_deploy.serving.results import ResultFolder, with_portraits

Saving = Callable[[bytes], Callable[[Path], None]]
NewClaim = Callable[..., Claim]


def test_written_results(tmp_path: Path, new_claim: NewClaim, saving: Saving) -> None:
    results, claim = ResultFolder(tmp_path), new_claim(3)
    result = results.write(claim, saving(b"video"), {"frames": 5})
    assert result.name == f"{claim.job.id}-3.mp4"
    assert (result.bytes, result.facts) == (5, {"frames": 5})
    assert results.path(result.name).read_bytes() == b"video"


def test_a_failed_write_leaves_nothing(tmp_path: Path, new_claim: NewClaim) -> None:
    def save(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        ResultFolder(tmp_path).write(new_claim(), save)
    assert list(tmp_path.iterdir()) == []


def test_names_stay_inside(tmp_path: Path) -> None:
    results = ResultFolder(tmp_path / "results")
    (tmp_path / "secret").write_text("x")
    with pytest.raises(InputError, match="outside"):
        results.path("../secret")
    with pytest.raises(InputError, match="outside"):
        results.remove(["../secret"])
    with pytest.raises(JobNotFound):
        results.path("gone.mp4")


def test_sweeping(tmp_path: Path, new_claim: NewClaim, saving: Saving) -> None:
    results = ResultFolder(tmp_path)
    kept, orphan = (results.write(new_claim(), saving(b"x")) for _ in range(2))
    (tmp_path / ".partial-left").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("of the operator")
    assert results.sweep(lambda: {kept.name}, older_than_s=60) == []
    assert results.sweep(lambda: {kept.name}) == sorted([".partial-left", orphan.name])
    assert {file.name for file in tmp_path.iterdir()} == {kept.name, "notes.txt"}


def test_portraits_of_videos_only() -> None:
    names = ["video_1-1.mp4", "video_2-1.png", ".partial-left"]
    assert with_portraits(iter(names)) == {*names, "video_1-1.png"}
