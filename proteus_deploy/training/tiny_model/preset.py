"""`train --preset tiny`: every network of the tiny model, one after the other, from nothing.

    folder/
        work/         what each part needs to go on: clips, states, logs
        base/         a checkpoint with everything but the transformer's weights
        encoded/      the training clips, as the networks of base/ see them
        transformer/  the run of the transformer
        encoders/     the networks of the measures, for `evaluate`
        checkpoint/   the tiny model
        timing.json   seconds and processor seconds of each part

Each part is skipped when it is done and goes on where it stopped when it isn't, so the same command is given
again after an interruption. With base/ and encoders/ there, work/ is no longer needed.
"""

from __future__ import annotations

import json
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

from proteus_deploy._files import atomic_directory, write_json
from proteus_deploy.reporting import Report, no_report
from proteus_deploy.tiny.checkpoint import MODEL_INDEX, SCHEDULER
from proteus_deploy.training.tiny_model.configs import TRAINING, TRANSFORMER, VAE

__all__ = ["train_tiny_model"]

_CLIPS = 2400  # of the VAE
_PHOTOS = 1200
_PEOPLE = 4000  # of the transformer, a clip each
_WORKERS = 2


def train_tiny_model(folder: Path, *, report: Report = no_report, cancel: Event | None = None) -> Path:
    """Make the tiny model in `folder`; return the folder of its checkpoint, in the published layout.

    Everything runs on the CPU. Raises Cancelled once `cancel` is set: the same call goes on.
    """
    parts = _Parts(folder, report, cancel)
    checkpoint = folder / "checkpoint"
    if checkpoint.is_dir():
        report("tiny model", 1, 1)
        return checkpoint
    base = folder / "base"
    if not (base.is_dir() and (folder / "encoders").is_dir()):
        faces = parts("faces", parts.train_faces)
        words = parts("text and image tower", parts.train_encoders)
        vae = parts("VAE", parts.train_vae)
        parts("measures", lambda: parts.train_measures(faces, words))
        parts("base checkpoint", lambda: parts.assemble(faces, words, vae))
    clips = parts("encoded clips", lambda: parts.encode(base))
    trained = parts("transformer", lambda: parts.train_transformer(base, clips))
    with atomic_directory(checkpoint) as new:
        shutil.copytree(trained, new, dirs_exist_ok=True)
    return checkpoint


class _Parts:
    """The parts of the work, each a method; called, it times one of them."""

    def __init__(self, folder: Path, report: Report, cancel: Event | None) -> None:
        self.folder, self.work = folder, folder / "work"
        self.report, self.cancel = report, cancel
        self.arguments: dict[str, Any] = {"report": report, "cancel": cancel}

    def __call__(self, name: str, part: Callable[[], Any]) -> Any:
        started, processor = time.perf_counter(), _processor_seconds()
        try:
            return part()
        finally:
            self._note(name, time.perf_counter() - started, _processor_seconds() - processor)

    def _note(self, name: str, seconds: float, processor_seconds: float) -> None:
        """Add to what earlier sittings spent on this part."""
        file = self.folder / "timing.json"
        timing = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        before = timing.get(name, {"seconds": 0.0, "processor_seconds": 0.0})
        timing[name] = {
            "seconds": round(before["seconds"] + seconds, 1),
            "processor_seconds": round(before["processor_seconds"] + processor_seconds, 1),
        }
        write_json(file, timing)

    def train_faces(self) -> Path:
        """Detector and the checkpoint's recogniser; returns their folder."""
        from proteus_deploy.training.tiny_model.face_detector import train_face_detector
        from proteus_deploy.training.tiny_model.recognisers import TINY_RECOGNISERS, train_recogniser

        folder = self.work / "faces"
        train_face_detector(folder, **self.arguments)
        for plan in TINY_RECOGNISERS:
            train_recogniser(folder, plan, **self.arguments)
        return folder

    def train_encoders(self) -> Path:
        """Tokenizer, text encoder, face parser and image tower, in the layout of a checkpoint."""
        from proteus_deploy.training.tiny_model.face_parser import train_face_parser
        from proteus_deploy.training.tiny_model.image_tower import train_image_tower
        from proteus_deploy.training.tiny_model.text_encoder import train_text_encoder

        folder = self.work / "encoders"
        train_text_encoder(folder, **self.arguments)
        train_face_parser(folder, **self.arguments)
        train_image_tower(folder, **self.arguments)
        return folder

    def train_vae(self) -> Path:
        """The autoencoder as a checkpoint keeps it: a folder with its config and weights."""
        from safetensors.torch import save_file

        from proteus_deploy.training.tiny_model.drawn_clips import draw_aligned_photos, draw_clips
        from proteus_deploy.training.tiny_model.vae import FrameBatches, latent_scale, train_vae

        folder = self.work / "vae"
        frames, parts = draw_clips(self.work / "clips", _CLIPS, report=self.report)
        photos = draw_aligned_photos(self.work / "clips", _PHOTOS, report=self.report)
        batches = FrameBatches(frames, parts, photos)
        vae = train_vae(folder, batches, **self.arguments)
        written = folder / "published"
        if not written.is_dir():
            with atomic_directory(written) as new:
                scale = latent_scale(vae, frames)
                write_json(new / "config.json", {**VAE, "scaling_factor": round(scale, 4)})
                weights = {key: value.half().contiguous() for key, value in vae.state_dict().items()}
                save_file(weights, new / "diffusion_pytorch_model.safetensors", {"format": "pt"})
        return written

    def assemble(self, faces: Path, encoders: Path, vae: Path) -> Path:
        """A checkpoint with all but the transformer's weights."""
        from proteus_deploy.identity.faces import PACK_FOLDER
        from proteus_deploy.training.tiny_model.face_detector import DETECTOR_NAME
        from proteus_deploy.training.tiny_model.recognisers import TINY_RECOGNISERS

        base = self.folder / "base"
        if base.is_dir():
            return base
        with atomic_directory(base) as new:
            write_json(new / "model_index.json", MODEL_INDEX)
            write_json(new / "scheduler" / "scheduler_config.json", SCHEDULER)
            write_json(new / "transformer" / "config.json", TRANSFORMER)
            shutil.copytree(vae, new / "vae")
            for name in ("tokenizer", "text_encoder", "face_encoder"):
                shutil.copytree(encoders / name, new / name)
            pack = new / "face_encoder" / PACK_FOLDER
            pack.mkdir(parents=True, exist_ok=True)
            for name in (DETECTOR_NAME, TINY_RECOGNISERS[0].name):
                shutil.copyfile(faces / name, pack / name)
        return base

    def train_measures(self, faces: Path, encoders: Path) -> Path:
        """The networks of `evaluate`: recognisers that the model doesn't have, CLIP, perceptual network."""
        from proteus_deploy.training.tiny_model.clip import train_clip
        from proteus_deploy.training.tiny_model.face_detector import DETECTOR_NAME
        from proteus_deploy.training.tiny_model.perceptual import train_perceptual_network
        from proteus_deploy.training.tiny_model.recognisers import TINY_RECOGNISERS

        clips = self.work / "clips"
        train_clip(encoders, clips=clips, **self.arguments)
        train_perceptual_network(encoders, clips=clips, **self.arguments)
        measures = self.folder / "encoders"
        if measures.is_dir():
            return measures
        with atomic_directory(measures) as new:
            pack = new / "models" / "buffalo_l"
            pack.mkdir(parents=True)
            for name in (DETECTOR_NAME, TINY_RECOGNISERS[1].name):
                shutil.copyfile(faces / name, pack / name)
            shutil.copyfile(faces / TINY_RECOGNISERS[2].name, new / "curricularface.safetensors")
            shutil.copytree(encoders / "clip", new / "clip")
            shutil.copyfile(encoders / "perceptual.safetensors", new / "perceptual.safetensors")
        return measures

    def encode(self, base: Path) -> Any:
        """The training clips through the networks of the base checkpoint."""
        from proteus_deploy.training.data.avatar_clips import AvatarClips
        from proteus_deploy.training.data.prepare import prepare

        return prepare(
            AvatarClips(_PEOPLE),
            base,
            self.folder / "encoded",
            workers=_WORKERS,
            **self.arguments,
        )

    def train_transformer(self, base: Path, clips: Any) -> Path:
        """MIF, TAII and the denoiser, from random weights."""
        from proteus_deploy.training.run import RunOptions, run_training

        options = RunOptions(from_scratch=True, dtype="float16", device="cpu", in_memory=True)
        return run_training(
            base, clips, self.folder / "transformer", TRAINING, options=options, **self.arguments
        )


def _processor_seconds() -> float:
    """Of this process and of those it waited for."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime
