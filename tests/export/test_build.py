"""A folder of engines is whole or absent; what is altered, foreign or left over is named or removed."""

from __future__ import annotations

import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from proteus_deploy import _files
from proteus_deploy.bundle import Bundle
from proteus_deploy.errors import BackendError, BundleError, Cancelled, InputError
from proteus_deploy.export.build import build_bundle
from proteus_deploy.export.engine_cache import EngineCache
from proteus_deploy.runtime import tensorrt_api
from proteus_deploy.runtime.tensorrt_api import EngineOptions, TensorRT

pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")

BUILDER = """
import sys
from proteus_deploy.bundle import Bundle
from proteus_deploy.export.build import build_bundle
bundle = Bundle.open(sys.argv[1])
while True:
    build_bundle(bundle, "sm89", progress=lambda graph, record: print(graph, record is not None, flush=True))
"""


def _contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def _hidden(bundle: Bundle) -> list[Path]:
    return list((bundle.folder / "engines").glob(".*"))


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_every_graph_is_built(new_bundle: Callable[..., Bundle], dtype: str) -> None:
    bundle = new_bundle("other", dtype)
    events: list[tuple[str, bool]] = []

    def progress(graph: str, record: Mapping[str, Any] | None) -> None:
        events.append((graph, record is not None))

    engines = build_bundle(bundle, "sm89", progress=progress)
    names = [graph.name for graph in bundle.table.graphs]
    assert list(engines.graphs) == sorted(names)
    assert events == [(name, done) for name in names for done in (False, True)]
    assert engines.folder == bundle.folder / "engines/sm89"
    assert sorted(_contents(engines.folder)) == sorted(
        [*(f"{name}.engine" for name in names), "manifest.json"]
    )
    document = engines.document
    assert (document["target"], document["flavour"]) == ("sm89", "tensorrt_rtx")
    assert document["version"] == TensorRT.load("tensorrt_rtx").version
    assert document["options"] == EngineOptions().to_json()
    assert document["graphs"]["first"]["stage"] == "first"
    assert document["graphs"]["first"]["contract"]["inputs"][0]["dtype"] == dtype
    assert engines.file("second_next").stat().st_size == engines.graphs["second_next"]["bytes"]
    assert Bundle.open(bundle.folder).targets == ("sm89",)
    assert not _hidden(bundle)


def test_targets_stand_beside_each_other_and_are_replaced(bundle: Bundle) -> None:
    first = build_bundle(bundle, "sm89", stages=["first"])
    build_bundle(bundle, "sm120", stages=["first"])
    assert bundle.targets == ("sm120", "sm89")
    again = build_bundle(bundle, "sm89", stages=["first"], options=EngineOptions(optimization_level=1))
    assert first.document["options"] != again.document["options"]
    assert not _hidden(bundle)


@pytest.mark.parametrize("exchange", [True, False])
def test_replacing_works_on_every_file_system(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    build_bundle(bundle, "sm89", stages=["first"])
    if not exchange:
        monkeypatch.setattr(_files, "_exchange", lambda one, other: False)
    assert len(build_bundle(bundle, "sm89").graphs) == 3
    assert not _hidden(bundle)


def test_other_stages_are_kept(bundle: Bundle) -> None:
    whole = _contents(build_bundle(bundle, "sm89").folder)
    engines = build_bundle(bundle, "sm89", stages=["second"])
    assert set(engines.graphs) == {"first", "second_start", "second_next"}
    assert _contents(engines.folder)["first.engine"] == whole["first.engine"]
    assert set(build_bundle(bundle, "sm86", stages=["second"]).graphs) == {"second_start", "second_next"}
    other = build_bundle(bundle, "sm89", stages=["second"], options=EngineOptions(tf32=True))
    assert set(other.graphs) == {"second_start", "second_next"}, "engines with other options don't mix"


def test_engines_of_another_export_are_not_kept(bundle: Bundle, new_bundle: Callable[..., Bundle]) -> None:
    build_bundle(bundle, "sm89")
    other = new_bundle("other", weight=0.5)
    shutil.copytree(bundle.folder / "engines", other.folder / "engines")
    with pytest.raises(
        BundleError, match="sm89 was built from another export of this bundle; build it again"
    ):
        other.engines("sm89")
    assert set(build_bundle(other, "sm89", stages=["first"]).graphs) == {"first"}


def test_unknown_stage_lists_the_known_ones(bundle: Bundle) -> None:
    with pytest.raises(InputError, match=r"no stage 'third' in .*; it has first, second"):
        build_bundle(bundle, "sm89", stages=["third"])


def test_refusals_leave_the_bundle_alone(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_api, "current_gpu", lambda index=0: None)
    with pytest.raises(InputError, match="no ahead-of-time target 'sm90'"):
        build_bundle(bundle, "sm90")
    with pytest.raises(BackendError, match="--refit"):
        build_bundle(bundle, "sm89", options=EngineOptions(refit=True))
    assert not (bundle.folder / "engines").exists()


def test_failure_half_way_keeps_the_old_engines(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    before = _contents(build_bundle(bundle, "sm89").folder)

    def progress(graph: str, record: Mapping[str, Any] | None) -> None:
        if graph == "second_next":
            raise RuntimeError("stop here")

    with pytest.raises(RuntimeError, match="stop here"):
        build_bundle(bundle, "sm89", progress=progress)
    assert _contents(bundle.engines("sm89").folder) == before
    assert not _hidden(bundle)


@pytest.mark.parametrize("after", [0, 1])
def test_cancelled_build_keeps_the_old_engines(bundle: Bundle, after: int) -> None:
    before = _contents(build_bundle(bundle, "sm89").folder)
    cancel, done = threading.Event(), []

    def progress(graph: str, record: Mapping[str, Any] | None) -> None:
        if record is not None:
            done.append(graph)
        if len(done) == after:
            cancel.set()  # before the first engine's first step, or between it and the next

    with pytest.raises(Cancelled):
        build_bundle(bundle, "sm89", progress=progress, cancel=cancel)
    assert len(done) == after
    assert _contents(bundle.engines("sm89").folder) == before
    assert not _hidden(bundle)


def test_exception_in_a_callback_is_not_swallowed(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C without the command line's handler: KeyboardInterrupt comes up inside a callback."""

    class Interrupted:
        def write(self, data: bytes) -> int:
            raise KeyboardInterrupt

    real = tensorrt_api._new_writer
    monkeypatch.setattr(
        tensorrt_api, "_new_writer", lambda module, log, stream: real(module, log, Interrupted())
    )
    with pytest.raises(KeyboardInterrupt):
        build_bundle(bundle, "sm89")
    assert not _hidden(bundle)
    monkeypatch.undo()
    assert build_bundle(bundle, "sm89").graphs, "the next build starts afresh"


def test_only_one_build_at_a_time(bundle: Bundle) -> None:
    build_bundle(bundle, "sm89", stages=["first"])
    descriptor = os.open(bundle.folder / "engines", os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another build is writing into"):
            build_bundle(bundle, "sm89")
    finally:
        os.close(descriptor)
    build_bundle(bundle, "sm89", stages=["first"])


def test_leftovers_are_removed_and_foreign_folders_are_not(bundle: Bundle) -> None:
    stale = bundle.folder / "engines/.partial-sm89-abc"
    stale.mkdir(parents=True)
    (stale / "first.engine").write_bytes(b"half")
    assert bundle.targets == ()
    own = bundle.folder / "engines/sm86"
    own.mkdir()
    build_bundle(bundle, "sm86", stages=["first"])  # an empty folder is in nobody's way
    assert not stale.exists()
    theirs = bundle.folder / "engines/sm80"
    theirs.mkdir()
    (theirs / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"sm80 exists and holds no engines of ours"):
        build_bundle(bundle, "sm80")
    assert (theirs / "notes.txt").read_text() == "mine"


def _append(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"x")


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_append, r"first\.engine has \d+ bytes, the manifest says \d+"),
        (lambda file: file.write_bytes(file.read_bytes()[:1000]), r"first\.engine has 1000 bytes"),
        (_flip, r"first\.engine differs from the manifest \(sha256\)"),
        (
            lambda file: shutil.copyfile(file.parent.parent / "sm86/first.engine", file),
            r"first\.engine (has|differs)",
        ),
        (lambda file: file.unlink(), r"first\.engine is missing"),
    ],
    ids=["longer", "truncated", "altered", "another target's", "missing"],
)
def test_damaged_engine_is_named(bundle: Bundle, change: Callable[[Path], Any], message: str) -> None:
    build_bundle(bundle, "sm86", stages=["first"])
    change(build_bundle(bundle, "sm89", stages=["first"]).file("first"))
    with pytest.raises(BundleError, match=message):
        bundle.engines("sm89")
    assert build_bundle(bundle, "sm89", stages=["first"]).graphs, "building again mends it"


def test_manifest_cannot_reach_outside(bundle: Bundle) -> None:
    folder = build_bundle(bundle, "sm89", stages=["first"]).folder
    document = json.loads((folder / "manifest.json").read_text())
    document["files"]["../../../secret"] = {"bytes": 1, "sha256": ""}
    (folder / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(BundleError, match="outside the bundle"):
        bundle.engines("sm89")


def test_cache_serves_the_next_build(bundle: Bundle, tmp_path: Path) -> None:
    cache = EngineCache(tmp_path / "cache")
    built = _contents(build_bundle(bundle, "sm89", cache=cache).folder)
    shutil.rmtree(bundle.folder / "engines")
    again = build_bundle(bundle, "sm89", cache=cache)
    assert all(record["cached"] for record in again.graphs.values())
    assert {n: c for n, c in _contents(again.folder).items() if n.endswith(".engine")} == {
        n: c for n, c in built.items() if n.endswith(".engine")
    }


def test_killed_build_leaves_nothing_half_made(bundle: Bundle) -> None:
    chance = random.Random(7)
    half_made = 0
    for _ in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", BUILDER, str(bundle.folder)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        for _ in range(chance.randrange(1, 9)):  # two lines for a graph, six for a build
            assert process.stdout.readline()
        time.sleep(chance.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        again = Bundle.open(bundle.folder)
        half_made += bool(_hidden(bundle))
        assert again.targets in ((), ("sm89",))
        for target in again.targets:
            assert len(again.engines(target).graphs) == 3
    assert half_made, "no build was caught half-way; the test proves nothing"
    assert len(build_bundle(bundle, "sm89").graphs) == 3
    assert not _hidden(bundle)


# Where a build that publishes over older engines is killed: (function, before or after it ran).
DEATHS = [
    ("write_engine_manifest", "before"),
    ("write_engine_manifest", "after"),
    ("publish_directory", "before"),
    ("publish_directory", "after"),
]
SUICIDE = """
import os, sys
from proteus_deploy.bundle import Bundle
from proteus_deploy.export import build
folder, name, when = sys.argv[1:]
work = getattr(build, name)
def die(*arguments):
    if when == "after":
        work(*arguments)
    os.kill(os.getpid(), 9)
setattr(build, name, die)
options = build.EngineOptions(optimization_level=1)
build.build_bundle(Bundle.open(folder), "sm89", stages=["first"], options=options)
"""


@pytest.mark.parametrize(("function", "when"), DEATHS)
def test_killed_while_replacing_leaves_old_or_new(bundle: Bundle, function: str, when: str) -> None:
    build_bundle(bundle, "sm89", stages=["first"])
    command = [sys.executable, "-c", SUICIDE, str(bundle.folder), function, when]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    replaced = (function, when) == ("publish_directory", "after")
    options = bundle.engines("sm89").document["options"]
    assert options["optimization_level"] == (1 if replaced else None)
    build_bundle(bundle, "sm89", stages=["first"])
    assert not _hidden(bundle)
