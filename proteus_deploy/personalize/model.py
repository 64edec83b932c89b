"""The model that an adapter is trained on, opened from a checkpoint or a bundle."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from proteus_deploy.adapters.inputs import check_room
from proteus_deploy.bundle import Bundle
from proteus_deploy.checkpoint import Checkpoint
from proteus_deploy.personalize.networks import DifferentiableBackend
from proteus_deploy.pipeline import Pipeline
from proteus_deploy.runtime import open_bundle_backend
from proteus_deploy.stage_cache import StageCache

__all__ = ["PersonalModel"]

_CACHE_BYTES = 1 << 30


@dataclass(frozen=True, eq=False)
class PersonalModel:
    """A pipeline on networks that carry gradients. base: hash of the checkpoint. source: what was opened: the
    bits of a bundle's text and identity are not a checkpoint's. face_encoder: its folder."""

    pipeline: Pipeline
    backend: DifferentiableBackend
    base: str
    source: str
    face_encoder: Path | None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.pipeline.close()

    @classmethod
    def from_checkpoint(cls, folder: str | Path, **options: Any) -> Self:
        """options: device, dtype and gradient_checkpointing of `DifferentiableBackend`."""
        checkpoint = Checkpoint.open(folder)
        backend = DifferentiableBackend.of_checkpoint(checkpoint, **options)
        parts = (checkpoint.vae, checkpoint.scheduler, checkpoint.tokenizer, checkpoint.face_encoder)
        base = checkpoint.hash
        pipeline = Pipeline(backend, checkpoint.transformer, *parts, cache=_cache(), weights=lambda: base)
        return cls(pipeline, backend, base, "checkpoint", checkpoint.face_encoder)

    @classmethod
    def from_bundle(cls, folder: str | Path | Bundle, **options: Any) -> Self:
        """What needs no gradients runs on ONNX Runtime. Raises as `DifferentiableBackend.of_bundle`."""
        bundle = folder if isinstance(folder, Bundle) else Bundle.open(folder)
        check_room(bundle.table, bundle.transformer.backbone)
        others = open_bundle_backend(bundle, "onnxruntime")
        backend = DifferentiableBackend.of_bundle(bundle, others, **options)
        pipeline = Pipeline.from_bundle(bundle, backend=backend, cache=_cache())
        faces = bundle.folder / "face_encoder"
        base = str(bundle.manifest["checkpoint"]["hash"])
        return cls(pipeline, backend, base, f"bundle {bundle.hash}", faces if faces.is_dir() else None)


def _cache() -> StageCache:
    """All videos of a run have one photo and one negative prompt."""
    return StageCache(_CACHE_BYTES)
