"""One training run from beginning to end: checkpoint, encoded clips, loop, checkpoints, samples."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from torch import Tensor

from proteus_deploy._files import hash_files
from proteus_deploy.checkpoint import Checkpoint
from proteus_deploy.errors import InputError
from proteus_deploy.reporting import Report, no_report
from proteus_deploy.training.batches import Batches
from proteus_deploy.training.checkpoints import load_network, new_network, noise_schedule, write_checkpoint
from proteus_deploy.training.data.cache import LatentDataset, PreparedSet
from proteus_deploy.training.data.networks import EncodingNetworks
from proteus_deploy.training.loop import STATE_FILE, Schedule, Trainer, make_accelerator
from proteus_deploy.training.samples import SampleCase, make_samples
from proteus_deploy.training.settings import TrainSettings
from proteus_deploy.training.state import check_settings, open_tensors

if TYPE_CHECKING:
    from proteus_deploy.evaluate.encoders import Encoders

__all__ = ["RunOptions", "check_run", "checkpoint_folder", "read_run_file", "run_training"]


@dataclass(frozen=True)
class RunOptions:
    """What surrounds the recipe; none of it changes the weights, but for `from_scratch`.

    from_scratch: begin with random weights; of the checkpoint's transformer only config.json is read then.
    dtype: of written checkpoints. device: "auto", or "cpu" to stay off GPUs. in_memory: keep all encoded
    clips in memory. cases, encoders, sample_steps, guidance_scale: videos made of each checkpoint.
    """

    from_scratch: bool = False
    dtype: str = "bfloat16"
    device: str = "auto"
    in_memory: bool = False
    schedule: Schedule = field(default_factory=Schedule)
    cases: Sequence[SampleCase] = ()
    encoders: Encoders | None = None
    sample_steps: int = 25
    guidance_scale: float = 6.0


def checkpoint_folder(folder: Path, step: int) -> Path:
    """Where a run keeps the checkpoint of a step."""
    return folder / "checkpoints" / f"step-{step:06d}"


def run_training(
    checkpoint: str | Path,
    clips: PreparedSet,
    folder: Path,
    settings: TrainSettings,
    *,
    options: RunOptions = RunOptions(),
    report: Report = no_report,
    cancel: Event | None = None,
) -> Path:
    """Train in `folder`, or go on there, and return the last checkpoint.

    clips: encoded by this checkpoint's own networks (`prepare`). Started by `accelerate launch`, each process
    calls this with the same arguments.
    Raises what `Trainer.train`, `Checkpoint.open` and `LatentDataset` raise.
    """
    opened = Checkpoint.open(checkpoint)
    _check_samples(settings, options)
    ablations = {"fusion_text": settings.fusion_text, "time_aware": settings.time_aware}
    if options.from_scratch:
        network = new_network(opened.transformer, seed=settings.seed, **ablations)
    else:
        network = load_network(opened, **ablations)
    dataset = LatentDataset(clips, in_memory=options.in_memory)
    network.check_sizes(dataset[0])
    batches = Batches(
        dataset,
        settings,
        noise_schedule(opened),
        _empty_prompt(opened, dataset) if settings.text_dropout else None,
    )
    accelerator = make_accelerator(settings, device=options.device)

    def keep(step: int, state: Mapping[str, Tensor]) -> None:
        written = checkpoint_folder(folder, step)
        write_checkpoint(opened.folder, state, written, dtype=options.dtype)
        if options.cases:
            scores = make_samples(
                written,
                options.cases,
                _samples_folder(folder, step),
                steps=options.sample_steps,
                guidance_scale=options.guidance_scale,
                encoders=options.encoders,
                device=str(accelerator.device),
                report=partial(report, f"samples of step {step}"),
            )
            trainer.log.scores(step, scores)

    def is_kept(step: int) -> bool:
        sampled = not options.cases or _samples_folder(folder, step).is_dir()
        return sampled and checkpoint_folder(folder, step).is_dir()

    trainer = Trainer(
        network,
        batches,
        settings,
        folder,
        accelerator=accelerator,
        schedule=options.schedule,
        on_checkpoint=keep,
        has_checkpoint=is_kept,
        inputs=_inputs(opened, clips, from_scratch=options.from_scratch),
    )
    trainer.train(report=report, cancel=cancel)
    return checkpoint_folder(folder, settings.steps)


def check_run(folder: Path, settings: TrainSettings) -> None:
    """Raises InputError when `folder` holds a run with other settings, before any work is done for it."""
    file = folder / STATE_FILE
    if file.exists():
        _, facts = open_tensors(file)
        check_settings(facts, asdict(settings), file)


def _samples_folder(folder: Path, step: int) -> Path:
    return folder / "samples" / f"step-{step:06d}"


def _inputs(checkpoint: Checkpoint, clips: PreparedSet, *, from_scratch: bool) -> dict[str, str]:
    """What a run was started on: hashes of the transformer's files and of the clips' names and contents."""
    base = checkpoint.folder / "transformer"
    names = (
        ["config.json"] if from_scratch else sorted(path.name for path in base.iterdir() if path.is_file())
    )
    files = "".join(f"{name} {digest}\n" for name, digest in hash_files(base, names))
    chosen = "".join(f"{clip.file.name}\n" for clip in clips.clips)
    return {
        "base transformer": hashlib.sha256(files.encode()).hexdigest(),
        "from_scratch": str(from_scratch),
        "clips": hashlib.sha256(chosen.encode()).hexdigest(),
    }


def _check_samples(settings: TrainSettings, options: RunOptions) -> None:
    """Ablated networks are no use in the pipeline, which feeds what they were trained without."""
    for name in ("fusion_text", "time_aware"):
        if options.cases and not getattr(settings, name):
            raise InputError(
                f"{name} is false; sample videos are made by the pipeline, which gives the network what it "
                "was trained without: leave the samples out"
            )


def _empty_prompt(checkpoint: Checkpoint, dataset: LatentDataset) -> tuple[Tensor, Tensor]:
    """The empty prompt as the clips' prompts were encoded: [L, d] and its mask [L]."""
    length = dataset[0]["prompt"].shape[0]
    embedded, mask = EncodingNetworks(checkpoint.folder).embed("", length)
    return embedded.detach().float(), mask


_TABLES = ("train", "video", "prepare")


def read_run_file(file: Path, tables: Sequence[str] = _TABLES) -> Mapping[str, Any]:
    """A TOML file with these tables. Raises InputError naming what is wrong."""
    import tomllib

    try:
        with file.open("rb") as stream:
            document = tomllib.load(stream)
    except (OSError, ValueError) as error:  # bytes that are no UTF-8 come as a ValueError of their own
        raise InputError(f"{file} can't be read as TOML ({error})") from error
    unknown = sorted(set(document) - set(tables))
    if unknown:
        known = ", ".join(f"[{name}]" for name in tables)
        raise InputError(f"{file}: [{unknown[0]}] is no table of a run; known are {known}")
    return document
