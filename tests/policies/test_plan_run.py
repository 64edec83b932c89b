"""Guidance on some steps: which rows run, and what stands in for the rest."""

from __future__ import annotations

import torch
from torch import Tensor

from proteus_deploy.policies import GuidanceInterval, GuidanceReuse, MagCache, Plan
from proteus_deploy.policies.plan_run import PlanRun
from proteus_deploy.policies.reuse import Levels

STEPS = 8
HALF = Levels(0.8, 0.6)
SCALE = 3.0


def positive_of(index: int) -> Tensor:
    return torch.full((1, 2, 3, 4, 5), 10.0 + index)


def negative_of(index: int) -> Tensor:
    return torch.full((1, 2, 3, 4, 5), 1.0 + index**2)


def play(plan: Plan | None, *, guided: bool = True) -> tuple[PlanRun, list[Tensor], list[int]]:
    """Velocities of all steps, and how many rows ran in each."""
    run, velocities, rows = PlanRun(plan, [999 - 100 * t for t in range(STEPS)], guided=guided), [], []
    for index in range(STEPS):
        step = run.begin(index, torch.zeros(1, 2, 3, 4, 5), HALF)
        rows.append(0)
        if step.computed:
            pair = [negative_of(index), positive_of(index)] if step.both else [positive_of(index)]
            rows[-1] = len(pair)
            run.keep(step, torch.cat(pair))
        velocities.append(run.velocity(SCALE))
    return run, velocities, rows


def exact(index: int) -> Tensor:
    return negative_of(index) + SCALE * (positive_of(index) - negative_of(index))


def test_without_a_plan_every_step_runs_both_prompts() -> None:
    run, velocities, rows = play(None)
    assert rows == [2] * STEPS
    assert all(torch.equal(velocities[index], exact(index)) for index in range(STEPS))
    assert run.record() == {"computed": [*range(STEPS)], "skipped": [], "both_prompts": [*range(STEPS)]}


def test_without_guidance_one_row_runs() -> None:
    run, velocities, rows = play(Plan(), guided=False)
    assert rows == [1] * STEPS
    assert all(torch.equal(velocities[index], positive_of(index)) for index in range(STEPS))
    assert run.record()["both_prompts"] == []


def test_outside_the_interval_the_prompt_stands_alone() -> None:
    _, velocities, rows = play(Plan(guidance_interval=GuidanceInterval(lowest=499, highest=799)))
    inside = [2, 3, 4, 5]
    assert rows == [2 if index in inside else 1 for index in range(STEPS)]
    for index in range(STEPS):
        assert torch.equal(velocities[index], exact(index) if index in inside else positive_of(index))


def test_between_the_full_steps_the_difference_is_the_last_one() -> None:
    _, velocities, rows = play(Plan(guidance_reuse=GuidanceReuse(every=3, warmup=2, last=1)))
    assert rows == [2, 2, 1, 1, 2, 1, 1, 2]
    for index, full in enumerate([0, 1, 1, 1, 4, 4, 4, 7]):
        difference = positive_of(full) - negative_of(full)
        want = positive_of(index) - difference + SCALE * difference
        torch.testing.assert_close(velocities[index], want)


def test_reuse_every_step_is_exact() -> None:
    _, velocities, rows = play(Plan(guidance_reuse=GuidanceReuse(every=1, warmup=1, last=0)))
    assert rows == [2] * STEPS
    assert all(torch.equal(velocities[index], exact(index)) for index in range(STEPS))


def test_a_step_cache_reuses_both_prompts_and_lets_the_scale_change() -> None:
    cache = MagCache(threshold=9, warmup=1, last=0, max_skips=None, ratios=(1.0,) * STEPS, reuse="velocity")
    run, velocities, rows = play(Plan(step_cache=cache))
    assert rows == [2, *[0] * (STEPS - 1)]
    assert all(torch.equal(velocity, exact(0)) for velocity in velocities)
    assert torch.equal(run.velocity(1.5), negative_of(0) + 1.5 * (positive_of(0) - negative_of(0)))


def test_all_policies_together() -> None:
    plan = Plan(
        step_cache=MagCache(threshold=9, warmup=1, last=1, max_skips=1, ratios=(1.0,) * STEPS),
        guidance_interval=GuidanceInterval(lowest=400),
        guidance_reuse=GuidanceReuse(every=4, warmup=1, last=1),
    )
    run, _, rows = play(plan)
    # Guided up to step 5. Computed: 0, 2, 4, 6 and the last; both prompts: 0, then 4 as the 4th after it.
    assert run.record() == {"computed": [0, 2, 4, 6, 7], "skipped": [1, 3, 5], "both_prompts": [0, 4]}
    assert rows == [2, 0, 1, 0, 2, 0, 1, 1]


def test_predictions_are_copies() -> None:
    run = PlanRun(None, [999], guided=True)
    step = run.begin(0, torch.zeros(1, 2, 3, 4, 5), HALF)
    run.keep(step, torch.cat([negative_of(0), positive_of(0)]))
    copy = run.prediction().copy()
    for tensor in (copy.latents, copy.positive, copy.negative):
        assert tensor is not None
        tensor.fill_(99)
    assert torch.equal(run.velocity(SCALE), exact(0))
