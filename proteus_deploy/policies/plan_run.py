"""A plan at work: what one request remembers between its steps.

B videos; a computed step has B rows, or 2B with the negative prompts first.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from proteus_deploy.guidance import combine_guidance
from proteus_deploy.policies.plan import Plan
from proteus_deploy.policies.reuse import Levels, Prediction, follow_trend, keep, restore

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Step:
    """What is done in step `index`, which begins with `latents` [B, F, C, h, w].

    computed: the denoiser runs; both: with the negative prompts as well as the prompts.
    guided: guidance acts on what comes out; gate: factor of the identity scale. side: which adapters and
    control videos act, and how strongly.
    """

    index: int
    latents: Tensor
    levels: Levels
    computed: bool
    both: bool
    guided: bool
    gate: float
    side: Hashable = ()


@dataclass(frozen=True, eq=False)
class _Kept:
    """What the last computed step left, in the form that its cache reuses."""

    positive: Tensor
    negative: Tensor | None
    asked: tuple[float, Hashable]  # the gate and the side of its step
    angle: float


class PlanRun:
    """Make one for each request (or batch) and ask it in each step: begin, keep if computed, velocity."""

    def __init__(self, plan: Plan | None, timesteps: Sequence[int], *, guided: bool) -> None:
        self._plan = plan or Plan()
        self._timesteps = timesteps
        self._guided = guided
        cache = self._plan.step_cache
        self._estimator = cache.estimator() if cache is not None else None
        self._age = 0.0
        self._skips = 0
        self._kept: _Kept | None = None
        self._before: _Kept | None = None  # the one computed before it, where a trend is followed
        self._current: Prediction | None = None
        self._difference: tuple[Step, Tensor] | None = None  # positive - negative
        self._record: dict[str, list[int]] = {"computed": [], "skipped": [], "both_prompts": []}

    def begin(self, index: int, latents: Tensor, levels: Levels, side: Hashable = ()) -> Step:
        """Decide what is done in a step; steps come in order, each once.

        side: stands for what else is asked of the denoiser in it. What was kept of a step with another one
        answers another question and isn't used.
        """
        interval, gates = self._plan.guidance_interval, self._plan.identity_gate
        timestep = self._timesteps[index]
        guided = self._guided and (interval is None or interval.contains(timestep))
        gate = 1.0 if gates is None else gates.factor(timestep)
        computed = not self._may_skip(index, latents, guided=guided, asked=(gate, side))
        both = computed and guided and not self._may_reuse_difference(index, side)
        step = Step(index, latents, levels, computed, both, guided, gate, side)
        self._record["computed" if computed else "skipped"].append(index)
        if both:
            self._record["both_prompts"].append(index)
        if not computed:
            self._skips += 1
            self._current = self._reused(step)
        return step

    def keep(self, step: Step, velocity: Tensor) -> None:
        """Take what the denoiser gave for a computed step: float32 [B or 2B, F, C, h, w]."""
        negative: Tensor | None = None
        if step.both:
            negative, positive = velocity.chunk(2)
            if self._plan.guidance_reuse is not None:
                self._difference = step, positive - negative
        else:
            positive = velocity
            if step.guided:
                assert self._difference is not None
                negative = positive - self._difference[1]
        self._current = Prediction(step.latents, step.levels, positive, negative)
        cache = self._plan.step_cache
        if cache is None or self._estimator is None:
            return
        self._estimator.computed(step.index, step.latents, positive)
        self._age, self._skips = 0.0, 0
        kept = [
            None if part is None else keep(cache.reuse, part, step.latents, step.levels)
            for part in (positive, negative)
        ]
        assert kept[0] is not None
        if cache.trend > 0:
            self._before = self._kept
        self._kept = _Kept(kept[0], kept[1], (step.gate, step.side), step.levels.angle)

    def prediction(self) -> Prediction:
        """Of the current step, computed or reused."""
        assert self._current is not None
        return self._current

    def velocity(self, scale: float) -> Tensor:
        """Of the current step, float32 [B, F, C, h, w], under guidance of this scale where it acts."""
        now = self.prediction()
        if now.negative is None:
            return now.positive
        return combine_guidance(now.negative, now.positive, scale)

    def record(self) -> dict[str, list[int]]:
        """Numbers of the steps so far, JSON-able: computed, skipped, and computed with both prompts."""
        return {name: list(steps) for name, steps in self._record.items()}

    def _may_skip(self, index: int, latents: Tensor, *, guided: bool, asked: tuple[float, Hashable]) -> bool:
        cache, kept = self._plan.step_cache, self._kept
        if cache is None or self._estimator is None:
            return False
        # Asked in every step: the estimators follow the latents, and ages add up over steps.
        self._age += self._estimator.ageing(index, latents)
        if kept is None or cache.computes(index, len(self._timesteps), self._skips):
            return False
        if kept.asked != asked or (guided and kept.negative is None):
            return False  # what was kept answers another question
        return self._age < cache.limit

    def _may_reuse_difference(self, index: int, side: Hashable) -> bool:
        reuse = self._plan.guidance_reuse
        if reuse is None or self._difference is None:
            return False
        if index < reuse.warmup or index >= len(self._timesteps) - reuse.last:
            return False
        earlier = self._difference[0]
        return earlier.side == side and index - earlier.index < reuse.every

    def _reused(self, step: Step) -> Prediction:
        cache, kept = self._plan.step_cache, self._kept
        assert cache is not None
        assert kept is not None
        before = self._before or kept

        def restored(last: Tensor, earlier: Tensor | None) -> Tensor:
            if cache.trend > 0 and earlier is not None and before is not kept and before.asked == kept.asked:
                angles = before.angle, kept.angle, step.levels.angle
                last = follow_trend(last, earlier, angles, cache.trend)
            return restore(cache.reuse, last, step.latents, step.levels)

        positive, negative = restored(kept.positive, before.positive), None
        if step.guided and kept.negative is not None:
            negative = restored(kept.negative, before.negative)
        return Prediction(step.latents, step.levels, positive, negative)
