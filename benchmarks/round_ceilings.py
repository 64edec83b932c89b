"""What the machine can do at best, measured once in every round of a benchmark, and the floor of a step."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from proteus_deploy.benchmarks.ceilings import copy_rate, denoiser_flops, product_rate

if TYPE_CHECKING:
    from proteus_deploy.benchmarks.denoising_loop import LoopInputs
    from proteus_deploy.checkpoint import Checkpoint
    from proteus_deploy.model.config import BackboneConfig

__all__ = ["RoundCeilings", "step_flops"]


class RoundCeilings:
    """Rates of products, in each precision that is measured, and of copies; medians over the rounds."""

    def __init__(
        self, backbone: BackboneConfig, inputs: LoopInputs, precisions: Iterable[tuple[str, torch.dtype]]
    ) -> None:
        """precisions: (name, dtype) of the candidates; doubles count once."""
        self._width = backbone.width
        frames, rows, columns = _grid(backbone, inputs)
        self._tokens = inputs.rows * (inputs.text.shape[1] + frames * rows * columns)
        self._precisions = dict(precisions)
        self._rates: dict[str, list[float]] = {}

    def measure(self, device: torch.device) -> None:
        """Once more, of everything."""
        for precision, dtype in self._precisions.items():
            rate = product_rate(dtype, device, tokens=self._tokens, width=self._width)
            self._rates.setdefault(f"products_{precision}", []).append(rate)
        self._rates.setdefault("copy_bytes_per_s", []).append(copy_rate(device))

    def medians(self) -> dict[str, float]:
        """{"products_bf16": FLOP/s, "copy_bytes_per_s": bytes/s, …}"""
        return {name: statistics.median(values) for name, values in self._rates.items()}


def step_flops(checkpoint: Checkpoint, inputs: LoopInputs) -> int:
    """FLOPs of one step of the denoiser under guidance, on inputs of that size."""
    from proteus_deploy.stage_table import build_stage_table
    from proteus_deploy.stages import sample_inputs

    table = build_stage_table(checkpoint)
    frames, rows, columns = _grid(checkpoint.transformer.backbone, inputs)
    size: dict[str, Any] = {"B": inputs.rows, "L": inputs.text.shape[1], "f": frames, "y": rows, "x": columns}
    return denoiser_flops(checkpoint, sample_inputs(table.graph("denoiser"), table.sizes("opt") | size))


def _grid(backbone: BackboneConfig, inputs: LoopInputs) -> tuple[int, int, int]:
    """Token frames, rows and columns."""
    _, frames, _, height, width = inputs.noise.shape
    patch = backbone.patch_size
    return frames // (backbone.patch_size_t or 1), height // patch, width // patch
