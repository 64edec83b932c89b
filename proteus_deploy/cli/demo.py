"""`proteus-deploy demo`: the whole way from a checkpoint to a video, with the tiny model of the package."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proteus_deploy.cli.demo_folder import clear, kept_checkpoint
from proteus_deploy.cli.output import print_table
from proteus_deploy.cli.progress import PhaseProgress, Progress
from proteus_deploy.cli.video_progress import VideoProgress, cancel_on_interrupt
from proteus_deploy.errors import BackendError, BundleError, InputError
from proteus_deploy.training.avatars.motion import MOTIONS

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from proteus_deploy.bundle import Bundle
    from proteus_deploy.checkpoint import Checkpoint
    from proteus_deploy.export.verify import VerificationReport
    from proteus_deploy.video import Video

NAME = "demo"
HELP = "do all of it with a small trained model: export, build, verify, generate, measure"

_TARGETS = ("sm89", "sm120")
_PERSON, _MOTION = 3, "wave"
_LIKENESS = "face_sim_arc"
_CLIP_SEED = 300  # chooses clothes and place of the prompt; no figure of the tiny model was measured on it
_MIB = 1 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument(
        "--output-dir", type=Path, default=Path("demo"), help="folder to work in (default: %(default)s)"
    )
    parser.add_argument(
        "--person",
        type=int,
        default=_PERSON,
        help="which of the drawn people that training never saw, 0 to 29 (default: %(default)s)",
    )
    parser.add_argument(
        "--motion", default=_MOTION, help=f"what the person does: {', '.join(MOTIONS)} (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the video's noise and the prompt (default: %(default)s)"
    )
    parser.add_argument(
        "--target",
        action="append",
        help=f"GPU to build engines for; repeat for several (default: {' and '.join(_TARGETS)})",
    )
    parser.add_argument("--no-engines", action="store_true", help="leave out the TensorRT engines")
    parser.add_argument(
        "--serve", action="store_true", help="then serve the bundle, with a page, until Ctrl-C"
    )


@dataclass
class _Demo:
    """The folder, and what was done in it: (what, path, note) for the table at the end."""

    folder: Path
    done: list[tuple[str, str, str]] = field(default_factory=list)

    def note(self, what: str, path: Path, text: str) -> None:
        self.done.append((what, str(path), text))


def run(arguments: argparse.Namespace) -> int:
    """Do every step, print what was done, and return 0, or 1 when a figure is outside its tolerance."""
    subject = _subject(arguments.person, arguments.motion, arguments.seed)
    if arguments.no_engines and arguments.target:
        raise InputError("--target and --no-engines were both given; leave one of them out")
    targets = () if arguments.no_engines else _resolve_targets(arguments.target or _TARGETS)
    started_s = time.monotonic()
    demo = _Demo(arguments.output_dir)
    checkpoint = _checkpoint(demo)
    photo = _photo(demo, subject)
    bundle = _bundle(demo, checkpoint)
    for target in targets:
        _engines(demo, bundle, target)
    if not targets:
        demo.note("engines", bundle.folder / "engines", "left out (--no-engines)")
    report = _verification(demo, bundle, checkpoint)
    video = _video(demo, bundle, subject, photo)
    _likeness(demo, video, photo)

    print_table(report.headers, report.table())
    print()
    print_table(("what", "where", "note"), demo.done)
    print()
    print(f"photo: drawn person {subject.person}, whom training never saw; prompt: {subject.prompt}")
    verdict = "every check is within its tolerance" if report.passed else "FAILED: see the rows above"
    print(f"{verdict}; {time.monotonic() - started_s:.0f} s in all")
    if not report.passed:
        return 1
    if arguments.serve:
        return _serve(bundle, demo.folder / "served")
    print(f"to make more of them in a browser: proteus-deploy serve {bundle.folder}")
    return 0


def _serve(bundle: Bundle, data_dir: Path) -> int:
    from proteus_deploy.cli import serve

    parser = argparse.ArgumentParser(prog="proteus-deploy serve")
    serve.add_arguments(parser)
    return serve.run(parser.parse_args([str(bundle.folder), "--data-dir", str(data_dir)]))


@dataclass(frozen=True)
class _Subject:
    """Whom the video shows, and what it is asked for. image: the photo, uint8 [512, 512, 3]."""

    person: int
    image: NDArray[np.uint8]
    prompt: str
    identity_prompt: str
    seed: int


def _subject(person: int, motion: str, seed: int) -> _Subject:
    """Raises InputError where there is no such person, movement or seed."""
    from proteus_deploy.training.avatars import HELD_OUT_SEEDS, make_clip, make_photo

    if seed < 0:
        raise InputError(f"--seed is {seed}; it must be 0 or more")
    if not 0 <= person < len(HELD_OUT_SEEDS):
        raise InputError(f"--person is {person}; choose 0 to {len(HELD_OUT_SEEDS) - 1}")
    if motion not in MOTIONS:
        raise InputError(f"--motion is {motion!r}; choose one of: {', '.join(MOTIONS)}")
    drawn = HELD_OUT_SEEDS[person]
    clip = make_clip(drawn, _CLIP_SEED + seed, motion=motion, num_frames=1)
    return _Subject(person, make_photo(drawn, 0).image, clip.prompt, clip.identity_prompt, seed)


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
    """The tiny model: the copy that is there, or a new one in the place of what an older demo left."""
    from proteus_deploy.checkpoint import Checkpoint
    from proteus_deploy.tiny.trained import ENCODERS, MODEL, copy_folder

    folder = demo.folder / "checkpoint"
    wanted = Checkpoint.open(MODEL).hash
    kept = kept_checkpoint(demo.folder)
    if kept is not None and kept.hash == wanted:
        demo.note("checkpoint", folder, "reused, it is the tiny model")
        return kept
    # What was made from the old checkpoint goes first: nothing may ever stand beside another one's.
    clear(demo.folder, checkpoint=wanted)
    copy_folder(ENCODERS, demo.folder / "encoders")
    copy_folder(MODEL, folder)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / _MIB
    what = "copied" if kept is None else "replaced, with all that was made from the old one"
    demo.note("checkpoint", folder, f"{what}: the trained tiny model, {size:.1f} MiB")
    return Checkpoint.open(folder)


def _photo(demo: _Demo, subject: _Subject) -> Path:
    from PIL import Image

    from proteus_deploy._files import atomic_file

    path = demo.folder / "photo.png"
    with atomic_file(path) as temporary:
        Image.fromarray(subject.image).save(temporary, format="PNG")
    demo.note("photo", path, f"drawn person {subject.person}")
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


def _video(demo: _Demo, bundle: Bundle, subject: _Subject, photo: Path) -> Video:
    from proteus_deploy.pipeline import Pipeline
    from proteus_deploy.request import GenerateRequest
    from proteus_deploy.tiny.trained import GUIDANCE_SCALE, NUM_INFERENCE_STEPS

    request = GenerateRequest(
        prompt=subject.prompt,
        identity_prompt=subject.identity_prompt,
        photo=photo,
        num_inference_steps=NUM_INFERENCE_STEPS,
        guidance_scale=GUIDANCE_SCALE,
        seed=subject.seed,
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
    demo.note("video", path, f"{what}, {NUM_INFERENCE_STEPS} steps on onnxruntime, {seconds:.1f} s")
    return video


def _likeness(demo: _Demo, video: Video, photo: Path) -> None:
    """FaceSim, by a recogniser that the model itself doesn't have."""
    from proteus_deploy.evaluate.encoders import load_encoders
    from proteus_deploy.evaluate.frames import frames_from_video
    from proteus_deploy.evaluate.measure import measure_video

    folder = demo.folder / "encoders"
    measured = measure_video(
        frames_from_video(video), photo=photo, encoders=load_encoders(folder), metrics=[_LIKENESS]
    )
    value = measured[_LIKENESS]
    text = "no face was found in the video" if value is None else f"FaceSim of photo and video {value:.2f}"
    demo.note("likeness", folder, text)
