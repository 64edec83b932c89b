"""Softmax losses with a margin between people, as face recognisers are trained with.

ArcFace (Deng et al. 2019, eq. 3): the angle to a face's own class is widened by m before the softmax over
s * cos. CurricularFace (Huang et al. 2020, eq. 6): other classes that are nearer than the widened own one
weigh cos * (t + cos), t being a running mean of the own cosines, so that hard faces count more as training
goes on.

B vectors, D their length, N people.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Loss", "MarginHead"]

Loss = Literal["arcface", "curricularface"]
# How fast t of CurricularFace follows the own cosines.
_MOMENTUM = 0.01


class MarginHead(nn.Module):
    """Class centres [N, D] and the loss over them; `scale` is s, `margin` m in radians."""

    difficulty: Tensor

    def __init__(
        self, people: int, dim: int, loss: Loss, *, scale: float = 20.0, margin: float = 0.3
    ) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.randn(people, dim) / math.sqrt(dim))
        self.kind, self.scale, self.margin = loss, scale, margin
        # t of CurricularFace.
        self.register_buffer("difficulty", torch.zeros(()))

    def forward(self, vectors: Tensor, who: Tensor, ease: float = 1.0) -> tuple[Tensor, Tensor]:
        """Two losses, scalars: against the centres, and within the batch.

        vectors: [B, D], the two crops of a person B/2 apart. who: int64 [B]. ease: 0..1, the part of the
        margin to use. Centres that nobody has visited yet teach little; the other crops of the batch do from
        the start.
        """
        vectors = F.normalize(vectors)
        ours = self._margin_loss(F.linear(vectors, F.normalize(self.centres)), who, ease)
        one, two = vectors.chunk(2)
        pairs = one @ two.T
        label = torch.arange(len(one))
        among = self._margin_loss(pairs, label, ease) + self._margin_loss(pairs.T, label, ease)
        return ours, 0.5 * among

    def _margin_loss(self, cosines: Tensor, who: Tensor, ease: float) -> Tensor:
        """The published loss. cosines: [B, M] with M classes. who: int64 [B], the own class."""
        cosines = cosines.clamp(-1 + 1e-6, 1 - 1e-6)
        own = cosines.gather(1, who[:, None])
        margin = self.margin * ease
        # cos(angle + m); beyond pi it would rise again, so there it goes on falling as a line.
        widened = own * math.cos(margin) - (1 - own**2).sqrt() * math.sin(margin)
        widened = torch.where(own > -math.cos(margin), widened, own - margin * math.sin(margin))
        others = cosines
        if self.kind == "curricularface":
            with torch.no_grad():
                if self.training:
                    self.difficulty.lerp_(own.mean(), _MOMENTUM)
            others = torch.where(cosines > widened.detach(), cosines * (self.difficulty + cosines), cosines)
        return F.cross_entropy(self.scale * others.scatter(1, who[:, None], widened), who)
