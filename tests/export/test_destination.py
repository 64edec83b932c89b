"""Where a bundle may go: decided before any work, and never over somebody's files."""

from __future__ import annotations

from pathlib import Path

import pytest

from proteus_deploy import InputError
from proteus_deploy._files import check_writable
from proteus_deploy.bundle import MANIFEST, Bundle
from proteus_deploy.export.export import _check_destination


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoints" / "one"
    folder.mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    return folder


def test_overwrite_replaces_bundles_only(tmp_path: Path, checkpoint: Path, bundle: Bundle) -> None:
    _check_destination(bundle.folder, checkpoint, overwrite=True)
    with pytest.raises(InputError, match="already exists and is not empty"):
        _check_destination(bundle.folder, checkpoint, overwrite=False)
    papers = tmp_path / "papers"
    papers.mkdir()
    _check_destination(papers, checkpoint, overwrite=False)  # empty folders are welcome
    (papers / "thesis.txt").write_text("x")
    with pytest.raises(InputError, match="not a bundle, so --overwrite does not replace it"):
        _check_destination(papers, checkpoint, overwrite=True)
    (papers / MANIFEST).write_text('{"kind": "somebody else\'s"}')
    with pytest.raises(InputError, match="not a bundle"):
        _check_destination(papers, checkpoint, overwrite=True)


def test_the_checkpoint_is_never_in_the_way(checkpoint: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(checkpoint)
    for place in (checkpoint, checkpoint / "bundle", checkpoint.parent, link, checkpoint / "x" / ".."):
        with pytest.raises(InputError, match="in one another"):
            _check_destination(place, checkpoint, overwrite=True)
    _check_destination(checkpoint.parent / "two", checkpoint, overwrite=False)


def test_the_current_folder_is_refused(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    with pytest.raises(InputError, match="current folder or a mount point"):
        _check_destination(Path(), checkpoint, overwrite=False)


def test_a_file_that_can_not_be_written_is_known_beforehand(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "report.json")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match="is a folder"):
        check_writable(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="can't write"):
        check_writable(tmp_path / "file" / "report.json")
