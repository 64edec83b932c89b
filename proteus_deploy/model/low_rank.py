"""What adapters add to the denoiser's attention, as inputs of its graph and not as weights.

One graph then serves any person: `y = W x + s (x A^T) B`, with A and B given at each call, row by row of the
batch. Several adapters on one row stand side by side in the rank, each with its own factor in `scale`, so a
timestep at which one of them rests is a zero there.

Axes: B batch (1 for one adapter over all rows), l blocks, r rank, s tokens, d width. The four projections of
a block, in the order of `PROJECTIONS`, all map d to d.
Sources: LoRA (arXiv 2106.09685); PersonalVideo's isolated identity adapter (arXiv 2411.17048).
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
MOST_RANK = 512  # of a video's adapters together; a file of one projection becomes the inputs of all of them
_OUT = PROJECTIONS.index("to_out.0")


class LowRank(NamedTuple):
    """Of one block: down and up [B, 4, r, d] in the activations' dtype; scale [B, 1, r]."""

    down: Tensor
    up: Tensor
    scale: Tensor

    def projection(self, x: Tensor, which: int) -> Tensor:
        """What is added to projection `which` of tokens [B, s, d]: [B, s, d]."""
        return ((x @ self.down[:, which].mT) * self.scale) @ self.up[:, which]

    def out(self, attended: Tensor) -> Tensor:
        """What is added to the projection of the heads' output [B, s, d]."""
        return self.projection(attended, _OUT)


class BlockAdapters(NamedTuple):
    """Of all blocks: down and up [B, l, 4, r, d], scale [B, r] float32."""

    down: Tensor
    up: Tensor
    scale: Tensor

    def of(self, block: int) -> LowRank:
        """The part of one block."""
        scale = self.scale.to(self.down.dtype)[:, None]
        return LowRank(self.down[:, block], self.up[:, block], scale)
