"""`proteus-deploy generate`: a video from a prompt and a photo, or a portrait that is drawn."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proteus_deploy._files import check_writable
from proteus_deploy.cli.adapter_flags import adapters_of, add_adapter_argument
from proteus_deploy.cli.control_flags import add_control_arguments, add_controlnet_argument, control_of
from proteus_deploy.cli.output import print_json, print_table
from proteus_deploy.cli.paths import Kind, kind_of, open_bundle
from proteus_deploy.cli.portrait_flags import (
    add_portrait_arguments,
    check_portrait_arguments,
    draw_photo,
    portrait_record,
)
from proteus_deploy.cli.quantize_flags import add_quantize_arguments, quantizer_of
from proteus_deploy.cli.video_progress import VideoProgress, cancel_on_interrupt
from proteus_deploy.errors import BackendError, InputError

if TYPE_CHECKING:
    from proteus_deploy.pipeline import Pipeline
    from proteus_deploy.request import GenerateRequest

NAME = "generate"
HELP = "make an mp4 of a person, by a photo or in words, from a bundle or a checkpoint"

_BUNDLE_BACKENDS = ("onnxruntime", "openvino", "tensorrt", "aotinductor")
_CHECKPOINT_BACKENDS = ("eager", "compiled")
_RANDOM = "random"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument("path", type=Path, metavar="BUNDLE_OR_CHECKPOINT")
    person = parser.add_mutually_exclusive_group(required=True)
    person.add_argument("--photo", type=Path, help="reference photo of the person")
    add_portrait_arguments(parser, person)
    parser.add_argument("--prompt", required=True, help="what happens in the video")
    parser.add_argument("--identity-prompt", default="", help="what the person looks like")
    parser.add_argument("--negative-prompt", help="what to stay away from")
    parser.add_argument("--output", type=Path, required=True, help="file to write, .mp4")
    parser.add_argument("--frames-dir", type=Path, help="also write each frame as PNG into this new folder")
    _add_video_arguments(parser)
    parser.add_argument(
        "--backend",
        choices=(*_BUNDLE_BACKENDS, *_CHECKPOINT_BACKENDS),
        help="default: onnxruntime for a bundle, eager for a checkpoint",
    )
    parser.add_argument("--device", help="e.g. cpu, cuda (default: the backend's own)")
    parser.add_argument(
        "--dtype", choices=("fp32", "fp16", "bf16"), help="checkpoint only (default: docs/generate.md)"
    )
    parser.add_argument(
        "--attention",
        metavar="NAME",
        help="checkpoint only: of the denoiser, docs/generate.md (default: torch)",
    )
    parser.add_argument(
        "--frozen",
        action="store_true",
        help="with --backend compiled on a CPU: faster with AVX512-BF16, weights once more for each size",
    )
    add_adapter_argument(parser)
    add_control_arguments(parser)
    add_controlnet_argument(parser, "checkpoint only: the control network that --control-video is for")
    add_quantize_arguments(parser)
    parser.add_argument("--vae-tiling", action="store_true", help="decode in tiles: less memory, more time")
    parser.add_argument(
        "--low-memory", action="store_true", help="hold no more than one part's networks at a time"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of the table")


def _add_video_arguments(parser: argparse.ArgumentParser) -> None:
    own = "(default: the checkpoint's own)"
    parser.add_argument("--height", type=int, help=f"pixels {own}")
    parser.add_argument("--width", type=int, help=f"pixels {own}")
    parser.add_argument("--num-frames", type=int, help=f"4k + 1 {own}")
    parser.add_argument("--fps", type=float, default=8, help="frames per second (default: %(default)s)")
    parser.add_argument("--num-inference-steps", type=int, default=50, help="(default: %(default)s)")
    parser.add_argument(
        "--guidance-scale", type=float, default=6.0, help="1 or less switches it off (default: %(default)s)"
    )
    parser.add_argument("--use-dynamic-cfg", action="store_true", help="let guidance grow over the steps")
    parser.add_argument(
        "--dynamic-cfg",
        choices=("published", "corrected"),
        help="with --use-dynamic-cfg: by timestep, as published (default), or by step index",
    )
    parser.add_argument(
        "--seed",
        type=seed_or_random,
        default=42,
        help=f"whole number, or '{_RANDOM}' to have one drawn (default: %(default)s)",
    )
    parser.add_argument("--scheduler", choices=("dpm", "ddim"), help=own)
    parser.add_argument(
        "--plan",
        type=Path,
        metavar="FILE",
        help="JSON of what may be left out of the loop (docs/policies.md)",
    )
    parser.add_argument(
        "--face-index", type=int, help="which face of the photo, from the left, from 0 (default: the largest)"
    )


def seed_or_random(text: str) -> int | None:
    """A number, or None for 'random'. Raises ArgumentTypeError, which argparse shows."""
    if text == _RANDOM:
        return None
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number and not '{_RANDOM}'") from None


def run(arguments: argparse.Namespace) -> int:
    """Make the video, say what it is and where, and return 0. Raises InputError for wrong input."""
    with cancel_on_interrupt() as cancel:  # before the imports of torch, which an exception would break
        kind = kind_of(arguments.path)
        _check_files(arguments)
        check_writable(arguments.output)  # now, and not after hours of work
        check_portrait_arguments(kind, arguments)
        request = _request(arguments)
        if not arguments.identity_prompt:
            print("no --identity-prompt: the person's look comes from the photo alone", file=sys.stderr)
        with _open(kind, arguments) as pipeline:
            started_s = time.perf_counter()
            request, portrait = draw_photo(pipeline, request, arguments, cancel)
            with VideoProgress(request.num_inference_steps) as progress:
                video = pipeline.generate(
                    request, on_step=progress.on_step, on_progress=progress.on_progress, cancel=cancel
                )
            seconds = time.perf_counter() - started_s
    if arguments.frames_dir is not None:
        video.save_frames(arguments.frames_dir)
    video.save(arguments.output)
    _, frames, _, height, width = video.frames.shape
    document = {
        "output": str(arguments.output),
        "frames_dir": str(arguments.frames_dir) if arguments.frames_dir else None,
        "frames": frames,
        "width": width,
        "height": height,
        "fps": video.fps,
        "seed": video.metadata["seed"],
        "backend": video.metadata["backend"],
        "dtype": video.metadata["dtype"],
        "source": kind,
        "num_inference_steps": request.num_inference_steps,
        "steps": video.metadata.get("steps"),
        "portrait": portrait_record(portrait, arguments),
        "seconds": round(seconds, 3),
    }
    _print(document, arguments)
    return 0


def _check_files(arguments: argparse.Namespace) -> None:
    """Everything about files that can be known before the networks are loaded."""
    photo, output, frames = arguments.photo, arguments.output, arguments.frames_dir
    if photo is not None and not photo.is_file():
        raise InputError(f"{photo} is not a file; --photo takes the reference photo of the person")
    if output.suffix.lower() != ".mp4":
        raise InputError(
            f"--output is {output}; videos are written as .mp4: try {output.with_suffix('.mp4')}"
        )
    if output.is_dir():
        raise InputError(f"--output is {output}, which is a folder; pass the name of a file in it")
    if frames is not None and frames.exists() and (not frames.is_dir() or any(frames.iterdir())):
        raise InputError(f"--frames-dir is {frames}, which exists and isn't empty; choose a new folder")
    if arguments.dynamic_cfg is not None and not arguments.use_dynamic_cfg:
        raise InputError("--dynamic-cfg chooses a kind of dynamic guidance; add --use-dynamic-cfg")


def _request(arguments: argparse.Namespace) -> GenerateRequest:
    from proteus_deploy.policies import read_plan
    from proteus_deploy.request import GenerateRequest

    return GenerateRequest(
        prompt=arguments.prompt,
        identity_prompt=arguments.identity_prompt,
        negative_prompt=arguments.negative_prompt,
        photo=arguments.photo,
        face_index=arguments.face_index,
        height=arguments.height,
        width=arguments.width,
        num_frames=arguments.num_frames,
        fps=arguments.fps,
        num_inference_steps=arguments.num_inference_steps,
        guidance_scale=arguments.guidance_scale,
        use_dynamic_cfg=arguments.use_dynamic_cfg,
        dynamic_cfg=arguments.dynamic_cfg or "published",
        seed=arguments.seed,
        scheduler=arguments.scheduler,
        plan=read_plan(arguments.plan) if arguments.plan is not None else None,
        adapters=adapters_of(arguments.adapter),
        control=control_of(arguments),
    )


def _open(kind: Kind, arguments: argparse.Namespace) -> Pipeline:
    """The pipeline on the backend asked for, or on the default one of `kind`."""
    from proteus_deploy.pipeline import Pipeline

    backend: str | None = arguments.backend
    quantize = quantizer_of(arguments, kind)
    if kind == "bundle":
        if arguments.dtype is not None:
            raise InputError(
                f"--dtype is {arguments.dtype}; a bundle runs in the precision that it was exported in: "
                "leave the flag out, or export again with it"
            )
        if arguments.attention is not None:
            raise InputError(
                f"--attention is {arguments.attention}; a bundle's graphs have theirs: leave the flag "
                "out, or generate from the checkpoint"
            )
        if arguments.frozen:
            raise InputError("--frozen is for checkpoints on --backend compiled; leave it out for a bundle")
        if arguments.controlnet is not None:
            raise InputError(
                f"--controlnet is {arguments.controlnet}; a bundle has the control network that it was "
                "exported with: leave the flag out, or export again with it"
            )
        return Pipeline.from_bundle(
            open_bundle(arguments.path),
            backend=backend or _BUNDLE_BACKENDS[0],
            device=arguments.device,
            vae_tiling=arguments.vae_tiling,
            low_memory=arguments.low_memory,
        )
    if backend in _BUNDLE_BACKENDS:
        raise BackendError(
            f"backend {backend!r} runs a bundle, and {arguments.path} is a checkpoint; make a bundle with: "
            f"proteus-deploy export {arguments.path} --output-dir DIR"
        )
    return Pipeline.from_checkpoint(
        arguments.path,
        device=arguments.device or "cpu",
        dtype=arguments.dtype,
        compiled=backend == "compiled",
        frozen=arguments.frozen,
        attention=arguments.attention or "torch",
        quantize=quantize,
        vae_tiling=arguments.vae_tiling,
        controlnet=arguments.controlnet,
        low_memory=arguments.low_memory,
    )


def _steps(document: dict[str, Any]) -> str:
    total, under_plan = document["num_inference_steps"], document["steps"]
    return str(total) if under_plan is None else f"{total}, {len(under_plan['computed'])} of them computed"


def _portrait_rows(portrait: dict[str, Any] | None) -> list[tuple[str, object]]:
    if portrait is None:
        return []
    file = f", {portrait['file']}" if portrait["file"] else ""
    return [("portrait", f"seed {portrait['seed']}{file}")]


def _print(document: dict[str, Any], arguments: argparse.Namespace) -> None:
    if arguments.json:
        print_json(document)
        return
    default = "" if arguments.backend else f" (default for a {document['source']})"
    rows: list[tuple[str, object]] = [
        ("frames", str(document["frames"])),
        ("size", f"{document['width']}x{document['height']}"),
        ("fps", f"{document['fps']:g}"),
        ("seed", str(document["seed"])),
        *_portrait_rows(document["portrait"]),
        ("steps", _steps(document)),
        ("backend", f"{document['backend']}, {document['dtype']}{default}"),
        ("seconds", f"{document['seconds']:.1f}"),
    ]
    if document["frames_dir"]:
        rows.append(("PNG frames", document["frames_dir"]))
    print_table(("video", document["output"]), rows)
