"""Files are whole or absent, whatever happens while they are written; names stay inside their folder."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from proteus_deploy import _files
from proteus_deploy._files import atomic_directory, atomic_file, inside, sha256_of, write_json
from proteus_deploy.errors import InputError

FILE_WRITER = """
import sys
from pathlib import Path
from proteus_deploy._files import atomic_file
print("ready", flush=True)
for round in range(1, 10_000):
    with atomic_file(Path(sys.argv[1])) as temporary, temporary.open("wb") as stream:
        for _ in range(64):
            stream.write(bytes([round % 256]) * 16384)
"""

DIRECTORY_WRITER = """
import sys
from pathlib import Path
from proteus_deploy import _files
from proteus_deploy._files import atomic_directory
print("ready", flush=True)
for round in range(10_000):
    with atomic_directory(Path(sys.argv[1]) / f"bundle-{round}") as temporary:
        for index in range(20):
            (temporary / f"{index}.bin").write_bytes(bytes(8192))
"""

REPLACER = """
import os, sys
from pathlib import Path
from proteus_deploy import _files
if sys.argv[2] == "dies":  # at its worst moment: right before or right after the two names change places
    exchange = _files._exchange
    def die(*names):
        if sys.argv[3] == "after":
            exchange(*names)
        os.kill(os.getpid(), 9)
    _files._exchange = die
print("ready", flush=True)
for round in range(10_000):
    with _files.atomic_directory(Path(sys.argv[1]) / "bundle", replace=True) as temporary:
        for index in range(20):
            (temporary / f"{index}.bin").write_bytes(bytes([round % 256]) * 8192)
"""


def _names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _kill_while_writing(program: str, target: Path, delay_s: float) -> None:
    command = [sys.executable, "-c", program, str(target)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        time.sleep(delay_s)
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL


def test_atomic_file_replaces_the_old_content(tmp_path: Path) -> None:
    target = tmp_path / "new" / "out.bin"
    for content in (b"one", b"two"):
        with atomic_file(target) as temporary:
            assert temporary.parent == target.parent
            temporary.write_bytes(content)
        assert target.read_bytes() == content
    assert target.stat().st_mode & 0o777 == 0o644
    assert _names_in(target.parent) == ["out.bin"]


def test_atomic_file_keeps_the_old_content_on_error(tmp_path: Path) -> None:
    target = tmp_path / "out.bin"
    target.write_bytes(b"old")

    def write_half() -> None:
        with atomic_file(target) as temporary:
            temporary.write_bytes(b"ha")
            raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError, match="disk is full"):
        write_half()
    assert target.read_bytes() == b"old"
    assert _names_in(tmp_path) == ["out.bin"]


def test_atomic_file_killed_at_any_moment_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "out.bin"
    for _ in range(6):
        _kill_while_writing(FILE_WRITER, target, random.uniform(0.0, 0.08))
        if target.exists():
            content = target.read_bytes()
            assert len(content) == 64 * 16384
            assert len(set(content)) == 1, "bytes of two rounds in one file"


def test_atomic_directory_killed_at_any_moment_is_whole(tmp_path: Path) -> None:
    for attempt in range(4):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        _kill_while_writing(DIRECTORY_WRITER, folder, random.uniform(0.0, 0.1))
        for bundle in folder.glob("bundle-*"):
            assert len(list(bundle.glob("*.bin"))) == 20
            assert {file.stat().st_size for file in bundle.iterdir()} == {8192}


def _one_whole_folder(folder: Path) -> int:
    """The round that wrote `folder`, after checking that one round wrote all of it."""
    files = sorted(folder.iterdir())
    assert len(files) == 20
    contents = {file.read_bytes() for file in files}
    assert len(contents) == 1, "files of two rounds in one folder"
    return contents.pop()[0]


def test_replaced_directory_is_there_at_any_moment(tmp_path: Path) -> None:
    """Also while it is being replaced, and whenever the writer is killed."""
    command = [sys.executable, "-c", REPLACER, str(tmp_path), "lives"]
    rounds: set[int] = set()
    # On a busy machine the writer may get nowhere in its time, so it gets more turns.
    for attempt in range(40):
        if attempt >= 4 and len(rounds) > 1:
            break
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
            while not (tmp_path / "bundle").exists():
                time.sleep(0.001)
            end_s, always = time.monotonic() + random.uniform(0.0, 0.15), True
            while time.monotonic() < end_s:
                always &= (tmp_path / "bundle").exists()
            child.send_signal(signal.SIGKILL)
            assert child.wait() == -signal.SIGKILL
        assert always, "for a moment there was no folder"
        rounds.add(_one_whole_folder(tmp_path / "bundle"))
    assert len(rounds) > 1, "no folder was ever replaced; the test proves nothing"


@pytest.mark.parametrize(("when", "want"), [("before", b"old"), ("after", bytes(8192))])
def test_replacing_directory_killed_at_the_exchange(tmp_path: Path, when: str, want: bytes) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "0.bin").write_bytes(b"old")
    command = [sys.executable, "-c", REPLACER, str(tmp_path), "dies", when]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "bundle" / "0.bin").read_bytes() == want
    assert len(_names_in(tmp_path)) == 2
    with atomic_directory(tmp_path / "bundle", replace=True):
        pass
    assert _names_in(tmp_path) == ["bundle"]


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("link", [True, False])
def test_replacing_directory_on_every_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool, link: bool
) -> None:
    if not exchange:
        monkeypatch.setattr(_files, "_exchange", lambda one, other: False)
    real, target = tmp_path / "disk" / "bundle", tmp_path / "bundle"
    if link:
        real.mkdir(parents=True)
        target.symlink_to(real)
    else:
        real = target
        target.mkdir()
    for name in ("first", "second"):
        with atomic_directory(target, replace=True) as temporary:
            (temporary / name).touch()
        assert _names_in(target) == [name]
    assert target.is_symlink() == link
    assert _names_in(real.parent) == ["bundle"]
    with pytest.raises(InputError, match="not empty"), atomic_directory(target):
        pass


def test_exchange_says_what_went_wrong(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        _files._exchange(tmp_path / "absent", tmp_path)


def test_abandoned_folders_of_living_processes_stay(tmp_path: Path) -> None:
    alive, dead = tmp_path / f".partial-bundle-{os.getpid()}-x", tmp_path / ".partial-bundle-4194305-x"
    other = tmp_path / ".partial-other-4194305-x"
    for folder in (alive, dead, other):
        folder.mkdir()
    with atomic_directory(tmp_path / "bundle"):
        pass
    assert _names_in(tmp_path) == sorted(["bundle", alive.name, other.name])


def test_atomic_directory_fills_an_empty_folder(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    target.mkdir()
    with atomic_directory(target) as temporary:
        (temporary / "nested").mkdir()
        (temporary / "nested" / "a.txt").write_text("a", encoding="utf-8")
    assert (target / "nested" / "a.txt").read_text(encoding="utf-8") == "a"
    assert _names_in(tmp_path) == ["bundle"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_atomic_directory_refuses_what_is_there(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "bundle"
    if kind == "folder":
        target.mkdir()
    (target / "old.txt" if kind == "folder" else target).write_text("old", encoding="utf-8")
    with pytest.raises(InputError, match="already exists and is not empty"), atomic_directory(target):
        pass
    assert _names_in(tmp_path) == ["bundle"]


def test_atomic_directory_leaves_nothing_on_error(tmp_path: Path) -> None:
    def write_half() -> None:
        with atomic_directory(tmp_path / "bundle") as temporary:
            (temporary / "a.txt").write_text("a", encoding="utf-8")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_half()
    assert _names_in(tmp_path) == []


def test_write_json_is_sorted_and_the_same_each_time(tmp_path: Path) -> None:
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    write_json(first, {"b": 1, "a": "é"})
    write_json(second, {"a": "é", "b": 1})
    assert first.read_bytes() == second.read_bytes()
    assert list(json.loads(first.read_text(encoding="utf-8"))) == ["a", "b"]


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1])
def test_sha256_of_any_size(tmp_path: Path, size: int) -> None:
    path = tmp_path / "data.bin"
    content = random.randbytes(size)
    path.write_bytes(content)
    assert sha256_of(path) == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("name", ["a.onnx", "stages/a.onnx", "stages/../a.onnx", "absent/b.onnx"])
def test_inside_accepts_what_stays_inside(tmp_path: Path, name: str) -> None:
    assert inside(tmp_path, name).is_relative_to(tmp_path.resolve())


@pytest.mark.parametrize("name", ["../a", "stages/../../a", "/etc/passwd", ".."])
def test_inside_refuses_what_climbs_out(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="points outside"):
        inside(tmp_path, name)


def test_inside_refuses_a_link_that_leads_out(tmp_path: Path) -> None:
    folder, secret = tmp_path / "bundle", tmp_path / "secret"
    folder.mkdir()
    secret.mkdir()
    (folder / "weights").symlink_to(secret)
    (folder / "safe").symlink_to("weights/../weights")
    for name in ("weights/key.bin", "weights", "safe/key.bin"):
        with pytest.raises(InputError, match="points outside"):
            inside(folder, name)
    (folder / "link").symlink_to("stages")
    assert inside(folder, "link/a.onnx") == folder.resolve() / "stages" / "a.onnx"


def test_inside_is_not_fooled_by_a_common_prefix(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    with pytest.raises(InputError, match="points outside"):
        inside(tmp_path / "bundle", "../bundle-other/a.onnx")
