"""What a benchmark measures: a checkpoint, a bundle, or a bundle beside the checkpoint it came from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proteus_deploy.tiny.trained import MODEL

if TYPE_CHECKING:
    from proteus_deploy.bundle import Bundle
    from proteus_deploy.checkpoint import Checkpoint
    from proteus_deploy.model.config import TransformerConfig

__all__ = ["Subject"]


@dataclass(frozen=True)
class Subject:
    """checkpoint: what PyTorch candidates run, and what is exported for the others when there is no bundle.

    At least one of the two is there; the checkpoint's configs count where both are.
    """

    checkpoint: Checkpoint | None
    bundle: Bundle | None

    @property
    def transformer(self) -> TransformerConfig:
        return self._source.transformer

    @property
    def scheduler(self) -> dict[str, Any]:
        """What scheduler_config.json holds."""
        return self.checkpoint.scheduler if self.checkpoint is not None else self._bundle.config("scheduler")

    @property
    def vae(self) -> dict[str, Any]:
        """What the VAE's config.json holds."""
        return self.checkpoint.vae if self.checkpoint is not None else self._bundle.config("vae")

    @property
    def tokenizer(self) -> Path:
        """Its folder; random weights have none and take the tiny model's, whose ids any vocabulary holds."""
        if self.checkpoint is None:
            return self._bundle.folder / "tokenizer"
        return MODEL / "tokenizer" if self.is_random else self.checkpoint.tokenizer

    @property
    def face_encoder(self) -> Path | None:
        """Folder of the face networks, where there is one."""
        if self.checkpoint is not None:
            return self.checkpoint.face_encoder
        faces = self._bundle.folder / "face_encoder"
        return faces if faces.is_dir() else None

    @property
    def is_random(self) -> bool:
        """Whether the weights are made up."""
        return self.checkpoint is not None and self.checkpoint.random_weights_seed is not None

    @property
    def weights(self) -> str:
        """The weights in words: their seed, or the checkpoint's hash."""
        if self.checkpoint is None:
            return str(self._bundle.manifest["checkpoint"]["hash"])
        seed = self.checkpoint.random_weights_seed
        return self.checkpoint.hash if seed is None else f"random, seed {seed}"

    @property
    def _bundle(self) -> Bundle:
        assert self.bundle is not None
        return self.bundle

    @property
    def _source(self) -> Checkpoint | Bundle:
        return self.checkpoint if self.checkpoint is not None else self._bundle
