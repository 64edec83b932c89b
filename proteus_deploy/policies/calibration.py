"""The numbers that MagCache and TeaCache need of a checkpoint and a schedule, from one recorded run each."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from proteus_deploy.errors import InputError
from proteus_deploy.model.layers import TimestepMLP, sinusoid
from proteus_deploy.model.transformer import OFS
from proteus_deploy.policies.reuse import Reuse, keep

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from proteus_deploy.checkpoint import Checkpoint
    from proteus_deploy.pipeline import StepEvent


class MagnitudeRecorder:
    """Pass it as `on_step` to exact runs of one schedule; `ratios` are then MagCache's.

    ratios[t] = |q_t| / |q_(t-1)|, Euclidean norms of what `reuse` keeps of steps t and t-1, averaged over the
    runs; ratios[0] is 1. Raises InputError for a run that left steps out or has another number of steps.
    """

    def __init__(self, reuse: Reuse = "residual") -> None:
        self.reuse = reuse
        self._runs: list[list[float]] = []

    def __call__(self, event: StepEvent) -> None:
        if not event.computed or event.prediction is None:
            raise InputError(
                f"step {event.index + 1} of {event.total} was not computed; magnitudes are recorded on exact "
                "runs: take the step cache out of the plan"
            )
        if event.index == 0:
            if self._runs and event.total != len(self._runs[0]):
                raise InputError(
                    f"a run of {event.total} steps after one of {len(self._runs[0])}; ratios belong to one "
                    "schedule: use another recorder for it"
                )
            self._runs.append([])
        now = event.prediction
        kept = keep(self.reuse, now.positive, now.latents, now.levels)
        self._runs[-1].append(float(kept.norm()))

    @property
    def ratios(self) -> tuple[float, ...]:
        """Raises InputError before a run was recorded, and when one was cut short or a magnitude is 0."""
        if not self._runs:
            raise InputError("no run was recorded; pass the recorder as on_step to Pipeline.generate")
        if len({len(run) for run in self._runs}) > 1:
            lengths = sorted({len(run) for run in self._runs})
            raise InputError(f"runs of {lengths} steps were recorded; record whole runs only")
        norms = torch.tensor(self._runs, dtype=torch.float64)
        if not bool((norms > 0).all()):
            raise InputError(f"a step's {self.reuse} has magnitude 0; record it with another reuse")
        ratios: list[float] = (norms[:, 1:] / norms[:, :-1]).mean(0).tolist()
        return (1.0, *ratios)


@torch.no_grad()
def time_embedding_changes(checkpoint: Checkpoint, timesteps: Sequence[int] | Tensor) -> tuple[float, ...]:
    """TeaCache's input for a schedule: mean |e_t - e_(t-1)| / mean |e_(t-1)|, e the float32 time embedding.

    The first entry is 0. Of the transformer's weights, only the time embedding's (for CogVideoX 1.5 also
    that of `ofs`, which is added to it) are read. Raises CheckpointError when they can't be.
    """
    backbone = checkpoint.transformer.backbone
    weights = checkpoint.weights("transformer")

    def embed(name: str, values: Tensor, channels: int, width: int) -> Tensor:
        perceptron = TimestepMLP(channels, width)
        perceptron.load_state_dict(
            {key: weights.tensor(f"{name}.{key}").float() for key in perceptron.state_dict()}
        )
        flip, shift = backbone.flip_sin_to_cos, backbone.freq_shift
        table = sinusoid(values, channels, flip_sin_to_cos=flip, freq_shift=shift)
        return perceptron(table)  # type: ignore[no-any-return]

    steps = torch.as_tensor(timesteps)
    embedding = embed("time_embedding", steps, backbone.width, backbone.time_embed_dim)
    if backbone.ofs_embed_dim is not None:
        size = backbone.ofs_embed_dim
        embedding = embedding + embed("ofs_embedding", torch.tensor([OFS]), size, size)
    moved = (embedding[1:] - embedding[:-1]).abs().mean(1) / embedding[:-1].abs().mean(1)
    changes: list[float] = moved.tolist()
    return (0.0, *changes)
