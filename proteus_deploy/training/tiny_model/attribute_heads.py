"""Linear heads that name attributes of avatars; they teach a network what to tell apart and are then dropped.

Axes: B examples, A attributes in the order of `ATTRIBUTES`, W width of the features.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from proteus_deploy.training.tiny_model.descriptions import ATTRIBUTES, UNKNOWN

__all__ = ["AttributeHeads", "label_table", "same_first_weights"]


class AttributeHeads(nn.Module):
    """One linear classifier for each of `names`, on features [B, W]."""

    def __init__(self, width: int, names: Sequence[str]) -> None:
        super().__init__()
        self.names = tuple(names)
        self.classes = [len(ATTRIBUTES[name]) for name in self.names]
        self.columns = [list(ATTRIBUTES).index(name) for name in self.names]
        self.linear = nn.Linear(width, sum(self.classes))

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        """Logits [B, classes] of each attribute."""
        parts = self.linear(features).split(self.classes, dim=1)
        return dict(zip(self.names, parts, strict=True))

    def loss(self, features: Tensor, labels: Tensor) -> Tensor:
        """Mean cross entropy over attributes, in parts of that of guessing. labels: int64 [B, A]."""
        total = features.new_zeros(())
        for (_, logits), column in zip(self(features).items(), self.columns, strict=True):
            label = labels[:, column]
            known = (label != UNKNOWN).sum().clamp(min=1)
            entropy = functional.cross_entropy(logits, label, ignore_index=UNKNOWN, reduction="sum") / known
            total = total + entropy / torch.tensor(float(logits.shape[1])).log()
        return total / len(self.names)

    @torch.no_grad()
    def accuracies(self, features: Tensor, labels: Tensor) -> dict[str, float]:
        """Share of right answers for each attribute, among the examples whose label is known."""
        found = {}
        for (name, logits), column in zip(self(features).items(), self.columns, strict=True):
            label = labels[:, column]
            known = label != UNKNOWN
            found[name] = (
                float((logits.argmax(dim=1) == label)[known].float().mean()) if known.any() else float("nan")
            )
        return found


def label_table(rows: Iterable[Mapping[str, int]]) -> Tensor:
    """int64 [B, A] from the labels of each example."""
    return torch.tensor([[row[name] for name in ATTRIBUTES] for row in rows], dtype=torch.int64)


@contextmanager
def same_first_weights(seed: int) -> Iterator[None]:
    """Modules made inside get weights that depend on `seed` alone; the caller's random numbers are kept."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
