"""What a portrait's cache holds, for the table of `portrait`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from proteus_deploy.portrait.onnx_painter import OnnxPainter
    from proteus_deploy.portrait.painter import Painter, TorchPainter
    from proteus_deploy.portrait.plan import CacheSettings
    from proteus_deploy.portrait.sampling import Sampling

__all__ = ["cache_room"]


def cache_room(
    painter: Painter, prompt: str, sampling: Sampling, cache: CacheSettings
) -> dict[str, int | None]:
    """Slots, of how many positions, and bytes of keys and values; None where the model doesn't say."""
    from proteus_deploy.portrait.onnx_painter import OnnxPainter
    from proteus_deploy.portrait.painter import TorchPainter

    if isinstance(painter, TorchPainter):
        slots, positions, size = _of_checkpoint(painter, prompt, sampling, cache)
        return {"slots": slots, "positions": positions, "cache_bytes": size}
    if isinstance(painter, OnnxPainter):
        slots, positions, size = _of_bundle(painter)
        return {"slots": slots, "positions": positions, "cache_bytes": size}
    return {"slots": None, "positions": None, "cache_bytes": None}


def _of_checkpoint(
    painter: TorchPainter, prompt: str, sampling: Sampling, cache: CacheSettings
) -> tuple[int, int, int]:
    gpt = painter.checkpoint.gpt
    condition = painter.captions.ids(prompt).shape[1]  # padding isn't kept
    slots = cache.plan(condition, gpt.block_size, gpt.grid_size).slots
    sequences = 2 if sampling.guidance_scale > 1 else 1
    size = gpt.cache_bytes(slots, sequences, painter.gpt.tok_embeddings.weight.element_size())
    return slots, condition + gpt.block_size, size


def _of_bundle(painter: OnnxPainter) -> tuple[int, int, int]:
    """Its graph keeps padding, in float32, for both halves of guidance in any case."""
    gpt, slots = painter.bundle.gpt, painter.bundle.plan.slots
    return slots, gpt.length, gpt.cache_bytes(slots, 2, 4)
