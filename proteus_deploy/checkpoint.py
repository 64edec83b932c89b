"""A checkpoint folder in the published layout: read, validated, hashed.

    model_index.json  transformer/  vae/  text_encoder/  tokenizer/  scheduler/  face_encoder/ (optional)

ConsisID folders saved by diffusers have the same layout with another transformer class.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from proteus_deploy._files import hash_files
from proteus_deploy.component_configs import check_scheduler, check_text_encoder, check_vae
from proteus_deploy.errors import CheckpointError
from proteus_deploy.model.config import TransformerConfig, read_transformer_config, shortened
from proteus_deploy.model.control_config import ControlConfig, read_control_config
from proteus_deploy.weights import SafetensorsFolder, read_json

COMPONENTS = ("transformer", "vae", "text_encoder")
SCHEDULERS = ("CogVideoXDPMScheduler", "CogVideoXDDIMScheduler")


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint. Configs are read at once, weights only when a network is built."""

    folder: Path
    transformer: TransformerConfig
    vae: dict[str, Any]
    text_encoder: dict[str, Any]
    scheduler: dict[str, Any]
    random_weights_seed: int | None = None
    controlnet: ControlCheckpoint | None = None

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        random_weights_seed: int | None = None,
        controlnet: str | Path | None = None,
    ) -> Checkpoint:
        """Read and validate the configs.

        controlnet: folder of a control network to use with it; it is no part of `hash`.

        `random_weights_seed` replaces all weights by random numbers made while they are read, so that a
        folder with configs only can be exported and measured at real size.
        Raises CheckpointError naming the file and field at fault.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise CheckpointError(
                f"{folder} is not a folder; a checkpoint is a folder with model_index.json in it"
            )
        read_json(folder / "model_index.json")
        transformer_file = folder / "transformer" / "config.json"
        transformer = read_transformer_config(read_json(transformer_file), str(transformer_file))
        vae = _expect(folder / "vae/config.json", "_class_name", ("AutoencoderKLCogVideoX",), check_vae)
        scheduler = _expect(
            folder / "scheduler/scheduler_config.json", "_class_name", SCHEDULERS, check_scheduler
        )
        text_encoder = _expect(folder / "text_encoder/config.json", "model_type", ("t5",), check_text_encoder)
        control = None if controlnet is None else ControlCheckpoint.open(controlnet, transformer)
        checkpoint = cls(folder, transformer, vae, text_encoder, scheduler, random_weights_seed, control)
        checkpoint._check_dimensions()
        return checkpoint

    def _check_dimensions(self) -> None:
        backbone = self.transformer.backbone
        pairs = (
            (
                "text_encoder d_model",
                self.text_encoder.get("d_model"),
                "text_embed_dim",
                backbone.text_embed_dim,
            ),
            ("vae latent_channels", self.vae.get("latent_channels"), "out_channels", backbone.out_channels),
        )
        for left, left_value, right, right_value in pairs:
            if left_value != right_value:
                raise CheckpointError(
                    f"{self.folder}: {left} is {left_value} but the transformer's {right} is {right_value}; "
                    "the parts come from different checkpoints"
                )

    def weights(self, component: str) -> SafetensorsFolder:
        """The safetensors of `transformer`, `vae` or `text_encoder`; raises as SafetensorsFolder does."""
        return SafetensorsFolder(self.folder / component)

    @property
    def face_encoder(self) -> Path | None:
        """Folder of the face networks; None in checkpoints that were published without it."""
        folder = self.folder / "face_encoder"
        return folder if folder.is_dir() else None

    @property
    def controlnet_hash(self) -> str | None:
        """Of the control network that it was opened with; None without one."""
        return None if self.controlnet is None else self.controlnet.hash

    @property
    def tokenizer(self) -> Path:
        folder = self.folder / "tokenizer"
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is missing; the prompt can't be turned into tokens without it")
        return folder

    @property
    def scheduler_file(self) -> Path:
        return self.folder / "scheduler" / "scheduler_config.json"

    @cached_property
    def scaling_factor(self) -> float:
        return float(self.vae["scaling_factor"])

    @cached_property
    def hash(self) -> str:
        """sha256 over every file's relative name and content hash, in name order; hidden ones left out.

        Links are followed, those to folders too: the content counts, not where it is kept.
        """
        digest = _folder_digest(self.folder)
        if self.random_weights_seed is not None:
            digest.update(f"random weights {self.random_weights_seed}\n".encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class ControlCheckpoint:
    """A control network's folder in the published layout: config.json and safetensors beside it."""

    folder: Path
    config: ControlConfig

    @classmethod
    def open(cls, folder: str | Path, denoiser: TransformerConfig) -> ControlCheckpoint:
        """Raises CheckpointError naming the file and field at fault, or what doesn't fit the denoiser."""
        folder = Path(folder)
        file = folder / "config.json"
        return cls(folder, read_control_config(read_json(file), denoiser, str(file)))

    def weights(self) -> SafetensorsFolder:
        """Raises as SafetensorsFolder does."""
        return SafetensorsFolder(self.folder)

    @cached_property
    def hash(self) -> str:
        """sha256 over its files, as `Checkpoint.hash`."""
        return _folder_digest(self.folder).hexdigest()


def _folder_digest(folder: Path) -> hashlib._Hash:
    digest = hashlib.sha256()
    names = sorted(_visible_files(folder), key=lambda name: name.split("/"))
    for name, content in hash_files(folder, names):
        digest.update(os.fsencode(f"{name}\0{content}\n"))
    return digest


def _visible_files(folder: Path) -> Iterator[str]:
    """Relative names of the files in `folder`, through links to folders.

    A link to a folder that it lies in is passed over: what is there has a name already.
    A download leaves time stamps in .cache, which are no part of the checkpoint: hidden names are left out.
    """
    real = {folder: {folder.resolve()}}  # folder -> itself and those above it, links resolved
    for path, folders, files in os.walk(folder, followlinks=True):
        here = Path(path)
        above = real.pop(here)
        inner = {name: (here / name).resolve() for name in folders if not name.startswith(".")}
        folders[:] = [name for name, target in inner.items() if target not in above]
        real |= {here / name: {*above, inner[name]} for name in folders}
        for name in files:
            file = here / name
            if not name.startswith(".") and file.is_file():
                yield file.relative_to(folder).as_posix()


def _expect(
    file: Path, key: str, allowed: tuple[str, ...], check: Callable[[Mapping[str, Any], str], None]
) -> dict[str, Any]:
    document = read_json(file)
    if document.get(key) not in allowed:
        raise CheckpointError(
            f"{file}: {key} is {shortened(document.get(key))}; this project knows {', '.join(allowed)}"
        )
    check(document, str(file))
    return document
