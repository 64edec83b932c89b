"""What MagCache, TeaCache and step schedules need of a checkpoint and a schedule, from recorded runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from proteus_deploy.errors import InputError
from proteus_deploy.model.layers import TimestepMLP, sinusoid
from proteus_deploy.model.transformer import OFS
from proteus_deploy.policies.reuse import Prediction, Reuse, keep

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
        now = _exact_prediction(event, "magnitudes")
        if event.index == 0:
            if self._runs and event.total != len(self._runs[0]):
                raise _other_schedule(event, len(self._runs[0]), "ratios")
            self._runs.append([])
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


class ChangeRecorder:
    """Pass it as `on_step` to exact runs of one schedule; `choose_steps` finds the steps worth computing.

    differences[i][t]: mean squared difference of the clean videos x0 = a x - s v that steps i < t gave, over
    all values and runs. signals[t]: a of step t. Raises InputError for a run that left steps out or has
    another number of steps. It holds one run's clean videos at a time.
    """

    def __init__(self) -> None:
        self.signals: list[float] = []
        self._sums: Tensor | None = None
        self._runs = 0
        self._clean: list[Tensor] = []

    def __call__(self, event: StepEvent) -> None:
        now = _exact_prediction(event, "changes")
        if event.index == 0:
            self._clean = []
            if self._sums is None:
                self._sums = torch.zeros(event.total, event.total, dtype=torch.float64)
            if event.total != len(self._sums):
                raise _other_schedule(event, len(self._sums), "changes")
        assert self._sums is not None
        if not self._runs:
            self.signals.append(now.levels.signal)
        clean = keep("clean", now.positive, now.latents, now.levels)
        for step, earlier in enumerate(self._clean):
            self._sums[step, event.index] += (clean - earlier).square().mean().double().cpu()
        self._clean.append(clean)
        if event.index == event.total - 1:
            self._runs += 1
            self._clean = []

    @property
    def differences(self) -> list[list[float]]:
        """Raises InputError before a run was recorded to its end, and when the last one was cut short."""
        if self._sums is None or not self._runs:
            raise InputError("no run was recorded; pass the recorder as on_step to Pipeline.generate")
        if self._clean:
            raise InputError(f"the last run ended after {len(self._clean)} steps; record whole runs only")
        table: list[list[float]] = (self._sums / self._runs).tolist()
        return table


def _exact_prediction(event: StepEvent, what: str) -> Prediction:
    if not event.computed or event.prediction is None:
        raise InputError(
            f"step {event.index + 1} of {event.total} was not computed; {what} are recorded on exact "
            "runs: take the step cache out of the plan"
        )
    return event.prediction


def _other_schedule(event: StepEvent, steps: int, what: str) -> InputError:
    return InputError(
        f"a run of {event.total} steps after one of {steps}; {what} belong to one schedule: use another "
        "recorder for it"
    )


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
