"""`proteus-deploy demo`: the whole way from a checkpoint to a video, with a small checkpoint made here."""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proteus_deploy.cli.output import print_table
from proteus_deploy.cli.progress import PhaseProgress, Progress
from proteus_deploy.cli.video_progress import VideoProgress, cancel_on_interrupt
from proteus_deploy.errors import BackendError, BundleError, InputError

if TYPE_CHECKING:
    from proteus_deploy.bundle import Bundle
    from proteus_deploy.checkpoint import Checkpoint
    from proteus_deploy.export.verify import VerificationReport

NAME = "demo"
HELP = "do all of it with a small checkpoint: export, build, verify, generate"

_MARK = "demo.json"
_KIND = "proteus_deploy demo"
_OWN = ("checkpoint", "bundle", "photo.png", "verification.json", "verification.md", "video.mp4")
_TARGETS = ("sm89", "sm120")
_PROMPT = "a person reads a letter by the window in the morning light"
_IDENTITY_PROMPT = "a person with short dark hair"
_STEPS = 12
_MIB = 1 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument(
        "--output-dir", type=Path, default=Path("demo"), help="folder to work in (default: %(default)s)"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of weights, portrait and video: another seed, another video (default: %(default)s)",
    )
    parser.add_argument(
        "--target",
        action="append",
        help=f"GPU to build engines for; repeat for several (default: {' and '.join(_TARGETS)})",
    )
    parser.add_argument("--no-engines", action="store_true", help="leave out the TensorRT engines")


@dataclass
class _Demo:
    """The folder, and what was done in it: (what, path, note) for the table at the end."""

    folder: Path
    seed: int
    done: list[tuple[str, str, str]] = field(default_factory=list)

    def note(self, what: str, path: Path, text: str) -> None:
        self.done.append((what, str(path), text))


def run(arguments: argparse.Namespace) -> int:
    """Do every step, print what was done, and return 0, or 1 when a figure is outside its tolerance."""
    if arguments.seed < 0:
        raise InputError(f"--seed is {arguments.seed}; it must be 0 or more")
    if arguments.no_engines and arguments.target:
        raise InputError("--target and --no-engines were both given; leave one of them out")
    targets = () if arguments.no_engines else _resolve_targets(arguments.target or _TARGETS)
    started_s = time.monotonic()
    demo = _Demo(arguments.output_dir, arguments.seed)
    checkpoint = _checkpoint(demo)
    photo = _photo(demo)
    bundle = _bundle(demo, checkpoint)
    for target in targets:
        _engines(demo, bundle, target)
    if not targets:
        demo.note("engines", bundle.folder / "engines", "left out (--no-engines)")
    report = _verification(demo, bundle, checkpoint)
    _video(demo, bundle, photo)

    print_table(report.headers, report.table())
    print()
    print_table(("what", "where", "note"), demo.done)
    print()
    verdict = "every check is within its tolerance" if report.passed else "FAILED: see the rows above"
    print(f"{verdict}; {time.monotonic() - started_s:.0f} s in all")
    print("The weights are random, so the video shows moving colours and no person.")
    return 0 if report.passed else 1


def _resolve_targets(names: Sequence[str]) -> tuple[str, ...]:
    """First of all, as a missing package should not show up after the export."""
    from proteus_deploy.export.build import DEFAULT_FLAVOUR
    from proteus_deploy.runtime.tensorrt_api import TensorRT

    try:
        api = TensorRT.load(DEFAULT_FLAVOUR)
    except BackendError as error:
        raise BackendError(f"{error}; or leave the engines out: proteus-deploy demo --no-engines") from error
    return tuple(dict.fromkeys(api.resolve_target(name) for name in names))


def _checkpoint(demo: _Demo) -> Checkpoint:
    """The checkpoint of this seed: the one that is there, or a new one in the place of an older demo's."""
    from proteus_deploy._files import write_json
    from proteus_deploy.checkpoint import Checkpoint
    from proteus_deploy.tiny.checkpoint import write_tiny_checkpoint

    folder = demo.folder / "checkpoint"
    previous = _read_mark(demo.folder)
    with Progress("writing the checkpoint", 1, unit="checkpoint") as progress:
        with tempfile.TemporaryDirectory(prefix="proteus-demo-") as temporary:
            wanted = Checkpoint.open(
                write_tiny_checkpoint(Path(temporary) / "checkpoint", seed=demo.seed)
            ).hash
        kept = _existing_checkpoint(folder, previous)
        if kept is not None and kept.hash == wanted:
            demo.note("checkpoint", folder, f"reused, it is that of seed {demo.seed}")
            progress.advance()
            return kept
        # What was made from the old checkpoint goes first: nothing may ever stand beside another one's.
        for name in _OWN:
            _remove(demo.folder / name)
        demo.folder.mkdir(parents=True, exist_ok=True)
        write_json(demo.folder / _MARK, {"kind": _KIND, "seed": demo.seed, "checkpoint": wanted})
        write_tiny_checkpoint(folder, seed=demo.seed)
        progress.advance()
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / _MIB
    what = "written" if kept is None else "replaced, with all that was made from the old one"
    demo.note("checkpoint", folder, f"{what}: seed {demo.seed}, untrained, {size:.1f} MiB")
    return Checkpoint.open(folder)


def _read_mark(folder: Path) -> Mapping[str, Any] | None:
    """What an earlier demo left in `folder`. Raises InputError when files there are somebody else's."""
    from proteus_deploy.weights import read_json

    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output-dir is {folder}, which is not a folder; choose another name")
    if (folder / _MARK).is_file():
        mark = read_json(folder / _MARK)
        if mark.get("kind") == _KIND:
            return mark
    foreign = [name for name in _OWN if (folder / name).exists()]
    if foreign:
        raise InputError(
            f"{folder / foreign[0]} is there and no earlier demo wrote it; choose another --output-dir"
        )
    return None


def _existing_checkpoint(folder: Path, mark: Mapping[str, Any] | None) -> Checkpoint | None:
    from proteus_deploy.checkpoint import Checkpoint

    if mark is None or not folder.exists():
        return None
    checkpoint = Checkpoint.open(folder)
    if checkpoint.hash != mark.get("checkpoint"):
        raise InputError(
            f"{folder} was changed after the demo wrote it; move it away, or choose another --output-dir"
        )
    return checkpoint


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        # Out of its name in one step: killed half way, no part of a folder stands for the whole.
        doomed = path.with_name(f".partial-{path.name}-{os.getpid()}-old")
        path.rename(doomed)
        shutil.rmtree(doomed)
    else:
        path.unlink(missing_ok=True)


def _photo(demo: _Demo) -> Path:
    from proteus_deploy._files import atomic_file
    from proteus_deploy.tiny.portrait import draw_portrait

    path = demo.folder / "photo.png"
    with atomic_file(path) as temporary:
        draw_portrait(demo.seed).save(temporary, format="PNG")
    demo.note("photo", path, "drawn")
    return path


def _bundle(demo: _Demo, checkpoint: Checkpoint) -> Bundle:
    from proteus_deploy.bundle import Bundle
    from proteus_deploy.export.export import export_bundle, versions

    folder = demo.folder / "bundle"
    reason = ""
    if folder.exists():
        try:
            bundle = Bundle.open(folder)
        except BundleError as error:
            reason = f"replaced: {error}"
        else:
            same_versions = bundle.manifest["versions"] == versions()
            if bundle.manifest["checkpoint"].get("hash") == checkpoint.hash and same_versions:
                demo.note("bundle", folder, f"reused, it was exported from this checkpoint ({bundle.dtype})")
                return bundle
            reason = "replaced: it was exported with other versions"
    started_s = time.monotonic()
    with PhaseProgress() as report:
        bundle = export_bundle(checkpoint, folder, overwrite=True, report=report)
    seconds = time.monotonic() - started_s
    count = len(bundle.table.graphs)
    demo.note("bundle", folder, f"{count} ONNX graphs, {bundle.dtype}, {seconds:.0f} s {reason}".rstrip())
    return bundle


def _engines(demo: _Demo, bundle: Bundle, target: str) -> None:
    from proteus_deploy.export.build import build_bundle
    from proteus_deploy.export.engine_cache import EngineCache, default_folder

    wanted = {graph.name for graph in bundle.table.graphs}
    try:
        engines = bundle.engines(target)
    except BundleError:
        pass  # none yet, or of another export: built below
    else:
        if set(engines.graphs) == wanted:
            demo.note(f"engines {target}", engines.folder, f"reused: {_status(engines.graphs)}")
            return
    started_s = time.monotonic()
    with Progress(f"building for {target}", len(wanted), unit="engine") as progress:

        def report(graph: str, record: Mapping[str, Any] | None) -> None:
            progress.advance(0 if record is None else 1, graph)

        engines = build_bundle(bundle, target, cache=EngineCache(default_folder()), progress=report)
    seconds = time.monotonic() - started_s
    demo.note(f"engines {target}", engines.folder, f"{_status(engines.graphs)}, {seconds:.0f} s")


def _status(graphs: Mapping[str, Mapping[str, Any]]) -> str:
    """For instance "10 engines, built, not run (3 from the cache)"."""
    kinds = sorted({str(record["status"]) for record in graphs.values()})
    cached = sum(bool(record.get("cached")) for record in graphs.values())
    note = f" ({cached} from the cache)" if cached else ""
    return f"{len(graphs)} engines, {' and '.join(kinds)}{note}"


def _verification(demo: _Demo, bundle: Bundle, checkpoint: Checkpoint) -> VerificationReport:
    from importlib.util import find_spec

    from proteus_deploy._files import atomic_file, write_json
    from proteus_deploy.export.verify import verify_bundle

    backends = [name for name in ("onnxruntime", "openvino") if find_spec(name) is not None]
    absent = [name for name in ("onnxruntime", "openvino") if name not in backends]
    with PhaseProgress() as progress:
        report = verify_bundle(bundle, backends, checkpoint=checkpoint.folder, report=progress)
    write_json(demo.folder / "verification.json", report.to_json())
    path = demo.folder / "verification.md"
    with atomic_file(path) as temporary:
        temporary.write_text(report.to_markdown(), encoding="utf-8")
    missing = f"; not installed, so not verified: {', '.join(absent)}" if absent else ""
    demo.note("verification", path, f"{', '.join(backends)} against PyTorch{missing}")
    return report


def _video(demo: _Demo, bundle: Bundle, photo: Path) -> None:
    from proteus_deploy.pipeline import Pipeline
    from proteus_deploy.request import GenerateRequest

    request = GenerateRequest(
        prompt=_PROMPT,
        identity_prompt=_IDENTITY_PROMPT,
        photo=photo,
        num_inference_steps=_STEPS,
        seed=demo.seed,
    )
    path = demo.folder / "video.mp4"
    with cancel_on_interrupt() as cancel, Pipeline.from_bundle(bundle) as pipeline:
        started_s = time.monotonic()
        with VideoProgress(request.num_inference_steps) as progress:
            video = pipeline.generate(
                request, on_step=progress.on_step, on_progress=progress.on_progress, cancel=cancel
            )
        seconds = time.monotonic() - started_s
    video.save(path)
    _, frames, _, height, width = video.frames.shape
    what = f"{frames} frames, {width}x{height}, {video.fps:g} fps"
    demo.note("video", path, f"{what}, {_STEPS} steps on onnxruntime, {seconds:.1f} s")
