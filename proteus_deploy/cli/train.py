"""`proteus-deploy train`: train a checkpoint on clips, or make the tiny model from nothing."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from proteus_deploy.cli.output import print_json
from proteus_deploy.cli.progress import PhaseProgress
from proteus_deploy.cli.video_progress import cancel_on_interrupt
from proteus_deploy.errors import InputError

if TYPE_CHECKING:
    from proteus_deploy.checkpoint import Checkpoint
    from proteus_deploy.reporting import Report
    from proteus_deploy.training.data.cache import PreparedSet
    from proteus_deploy.training.data.clips import ClipSource
    from proteus_deploy.training.run import RunOptions
    from proteus_deploy.training.settings import TrainSettings

NAME = "train"
HELP = "train MIF, TAII and the transformer on clips; stop and go on at any step"

# Flag -> key of the table in a settings file that it stands for.
_TRAIN_FLAGS = (
    "steps", "batch_size", "micro_batch", "learning_rate", "warmup", "trainable", "mixed_precision", "seed",
    "ema", "text_dropout",
)  # fmt: skip
_VIDEO_FLAGS = ("num_frames", "height", "width", "frame_stride")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument("checkpoint", type=Path, nargs="?", metavar="CHECKPOINT", help="what to train on")
    parser.add_argument(
        "--preset",
        choices=("tiny", "tiny-portrait"),
        help="make the tiny model, all of it, from nothing; or the tiny portrait model",
    )
    parser.add_argument(
        "--data",
        metavar="PATH",
        help="folder of NAME.mp4, NAME.txt and NAME.identity.txt, or shards like clips-{000..009}.tar",
    )
    parser.add_argument("--output-dir", type=Path, required=True, metavar="DIR", help="the run's own folder")
    parser.add_argument(
        "--cache-dir", type=Path, metavar="DIR", help="encoded clips (default: OUTPUT_DIR/encoded)"
    )
    parser.add_argument("--settings", type=Path, metavar="FILE", help="TOML: [train], [video] and [prepare]")
    recipe = parser.add_argument_group("recipe (these win over the settings file)")
    recipe.add_argument("--steps", type=int, metavar="N")
    recipe.add_argument("--batch-size", type=int, metavar="N", help="clips in a step, over all processes")
    recipe.add_argument("--micro-batch", type=int, metavar="N", help="clips that one process takes at once")
    recipe.add_argument("--learning-rate", type=float, metavar="RATE")
    recipe.add_argument("--warmup", type=int, metavar="N", help="steps over which the rate rises")
    recipe.add_argument("--trainable", choices=("identity", "all"), help="identity modules only, or all")
    recipe.add_argument("--mixed-precision", choices=("no", "bf16"))
    recipe.add_argument("--ema", type=float, metavar="SHARE", help="kept of the averaged weights; 0: none")
    recipe.add_argument(
        "--text-dropout", type=float, metavar="SHARE", help="prompts replaced by the empty one"
    )
    recipe.add_argument("--seed", type=int)
    recipe.add_argument("--from-scratch", action="store_true", help="begin with random weights")
    clips = parser.add_argument_group("clips")
    clips.add_argument("--num-frames", type=int, help="4n + 1 (default: the checkpoint's own)")
    clips.add_argument("--height", type=int, help="pixels (default: the checkpoint's own)")
    clips.add_argument("--width", type=int, help="pixels (default: the checkpoint's own)")
    clips.add_argument("--frame-stride", type=int, help="every how manyth frame of a video is taken (3)")
    clips.add_argument(
        "--allow-reference-inside-clip",
        action="store_true",
        help="where no frame outside the clip shows the face, take one inside",
    )
    clips.add_argument(
        "--identity-caption-from-caption",
        action="store_true",
        help="where NAME.identity.txt is missing, use NAME.txt",
    )
    clips.add_argument("--workers", type=int, default=0, metavar="N", help="processes that encode clips (0)")
    clips.add_argument("--prepare-only", action="store_true", help="encode the clips and stop")
    _add_output_arguments(parser.add_argument_group("what is written"))


def _add_output_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--checkpoint-every", type=int, default=0, metavar="N", help="steps (0: the last only)"
    )
    group.add_argument(
        "--save-every",
        type=float,
        default=300.0,
        metavar="SECONDS",
        help="between states to go on from (300)",
    )
    group.add_argument(
        "--dtype", choices=("fp32", "fp16", "bf16"), default="bf16", help="of checkpoints (bf16)"
    )
    group.add_argument("--samples", type=Path, metavar="FILE", help="JSON cases: a video of each checkpoint")
    group.add_argument(
        "--encoders", type=Path, metavar="DIR", help="measure FaceSim of the samples with these"
    )
    group.add_argument("--num-inference-steps", type=int, default=25, metavar="N", help="of samples (25)")
    group.add_argument("--guidance-scale", type=float, default=6.0, help="of samples (6)")
    group.add_argument("--device", choices=("auto", "cpu"), default="auto", help="cpu keeps off GPUs (auto)")
    group.add_argument("--json", action="store_true", help="print one JSON document at the end")


def run(arguments: argparse.Namespace) -> int:
    """Prepare, train, and print where the checkpoint is. Interrupted, it saves first."""
    with cancel_on_interrupt() as cancel, PhaseProgress(quiet=_rank() > 0) as report:
        if arguments.preset is not None:
            return _preset(arguments, report, cancel)
        return _train(arguments, report, cancel)


def _train(arguments: argparse.Namespace, report: Report, cancel: Event) -> int:
    from proteus_deploy.checkpoint import Checkpoint
    from proteus_deploy.training.run import check_run, run_training

    if arguments.checkpoint is None or arguments.data is None:
        raise InputError("give a CHECKPOINT and --data, or --preset tiny")
    checkpoint = Checkpoint.open(arguments.checkpoint)
    document = _settings_file(arguments)
    settings = _train_settings(arguments, document)
    settings.share(_processes())
    options = _options(arguments)
    check_run(arguments.output_dir, settings)
    clips = _prepare(arguments, checkpoint, document, report, cancel)
    if arguments.prepare_only:
        return _finish(arguments, clips, None) if _rank() == 0 else 0
    last = run_training(
        arguments.checkpoint,
        clips,
        arguments.output_dir,
        settings,
        options=options,
        report=report,
        cancel=cancel,
    )
    return _finish(arguments, clips, last) if _rank() == 0 else 0


def _preset(arguments: argparse.Namespace, report: Report, cancel: Event) -> int:
    from proteus_deploy.training.tiny_model.preset import train_tiny_model
    from proteus_deploy.training.tiny_portrait.preset import train_tiny_portrait

    if arguments.checkpoint is not None:
        raise InputError("--preset makes its own checkpoint; leave CHECKPOINT out")
    if given := _flags_beside_preset(arguments):
        raise InputError(f"--preset is a whole recipe of its own; leave {', '.join(given)} out")
    train = train_tiny_model if arguments.preset == "tiny" else train_tiny_portrait
    folder = train(arguments.output_dir, report=report, cancel=cancel)
    if arguments.json:
        print_json({"checkpoint": str(folder)})
    else:
        print(folder)
    return 0


def _flags_beside_preset(arguments: argparse.Namespace) -> list[str]:
    """Flags that were given and that a preset would not heed."""
    parser = argparse.ArgumentParser(add_help=False)
    add_arguments(parser)
    heeded = ("checkpoint", "preset", "output_dir", "json")
    unset = vars(parser.parse_args(["--output-dir", "."]))
    return [
        f"--{name.replace('_', '-')}"
        for name, value in unset.items()
        if name not in heeded and getattr(arguments, name) != value
    ]


def _settings_file(arguments: argparse.Namespace) -> Mapping[str, Any]:
    from proteus_deploy.training.run import read_run_file

    return {} if arguments.settings is None else read_run_file(arguments.settings)


def _train_settings(arguments: argparse.Namespace, document: Mapping[str, Any]) -> TrainSettings:
    from proteus_deploy.training.settings import TrainSettings, read_settings

    settings = read_settings(document.get("train", {}), TrainSettings(), f"{arguments.settings} [train]")
    return read_settings(_given(arguments, _TRAIN_FLAGS), settings, "command line")


def _options(arguments: argparse.Namespace) -> RunOptions:
    from proteus_deploy.training.loop import Schedule
    from proteus_deploy.training.run import RunOptions
    from proteus_deploy.training.samples import read_cases

    if arguments.encoders is not None and arguments.samples is None:
        raise InputError(
            f"--encoders {arguments.encoders} measures sample videos, and there are none; say which with "
            "--samples FILE"
        )
    encoders = None
    if arguments.encoders is not None:
        from proteus_deploy.evaluate.encoders import load_encoders

        encoders = load_encoders(arguments.encoders)
    return RunOptions(
        from_scratch=arguments.from_scratch,
        dtype=arguments.dtype,
        device=arguments.device,
        schedule=Schedule(checkpoint_every=arguments.checkpoint_every, save_every_s=arguments.save_every),
        cases=() if arguments.samples is None else read_cases(arguments.samples),
        encoders=encoders,
        sample_steps=arguments.num_inference_steps,
        guidance_scale=arguments.guidance_scale,
    )


def _prepare(
    arguments: argparse.Namespace,
    checkpoint: Checkpoint,
    document: Mapping[str, Any],
    report: Report,
    cancel: Event,
) -> PreparedSet:
    from proteus_deploy.training.data.cache import PreparedSet
    from proteus_deploy.training.data.encoding import PrepareSettings
    from proteus_deploy.training.data.prepare import prepare
    from proteus_deploy.training.settings import read_settings

    cache = arguments.cache_dir or arguments.output_dir / "encoded"
    if _processes() > 1:
        # One process would encode for hours while the others wait, and time out.
        try:
            return PreparedSet.open(cache)
        except InputError as error:
            raise InputError(f"{error}; run the same command once, alone, with --prepare-only") from error
    settings = read_settings(
        document.get("prepare", {}), PrepareSettings(), f"{arguments.settings} [prepare]"
    )
    return prepare(
        _source(arguments, checkpoint, document.get("video", {})),
        arguments.checkpoint,
        cache,
        settings=settings,
        report=report,
        cancel=cancel,
        workers=arguments.workers,
    )


def _source(arguments: argparse.Namespace, checkpoint: Checkpoint, document: Mapping[str, Any]) -> ClipSource:
    from proteus_deploy.stage_table import VAE_SPATIAL
    from proteus_deploy.training.data.folder import FolderClips
    from proteus_deploy.training.data.video_frames import VideoOptions
    from proteus_deploy.training.data.webdataset import WebDatasetClips
    from proteus_deploy.training.settings import read_settings

    backbone = checkpoint.transformer.backbone
    own = VideoOptions(
        num_frames=backbone.sample_frames,
        height=backbone.sample_height * VAE_SPATIAL,
        width=backbone.sample_width * VAE_SPATIAL,
    )
    options = read_settings(document, own, f"{arguments.settings} [video]")
    flags = _given(arguments, _VIDEO_FLAGS)
    for name in ("allow_reference_inside_clip", "identity_caption_from_caption"):
        if getattr(arguments, name):
            flags[name] = True
    options = read_settings(flags, options, "command line")
    if ".tar" in arguments.data and not Path(arguments.data).is_dir():
        return WebDatasetClips(arguments.data, options)
    return FolderClips(arguments.data, options)


def _given(arguments: argparse.Namespace, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}


def _finish(arguments: argparse.Namespace, clips: PreparedSet, checkpoint: Path | None) -> int:
    if arguments.json:
        print_json(
            {
                "checkpoint": None if checkpoint is None else str(checkpoint),
                "clips": len(clips),
                "data": clips.report.document(),
            }
        )
    else:
        print(clips.report.text())
        if checkpoint is not None:
            print(checkpoint)
    return 0


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))
