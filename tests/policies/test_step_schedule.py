"""Step schedules: which steps they compute, how the list is chosen, and results that follow their trend."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from proteus_deploy.errors import InputError
from proteus_deploy.policies import EasyCache, MagCache, Plan, StepSchedule, choose_steps
from proteus_deploy.policies.calibration import ChangeRecorder
from proteus_deploy.policies.plan_run import PlanRun
from proteus_deploy.policies.reuse import Levels, Prediction

TOTAL = 7
# Signal and noise of a circle: the angle falls from near noise to near video by equal steps.
LEVELS = [
    Levels(float(torch.sin(angle)), float(torch.cos(angle))) for angle in torch.linspace(0.1, 1.4, TOTAL)
]


def play(plan: Plan, clean: list[Tensor]) -> tuple[PlanRun, list[Tensor]]:
    """An unguided run on zero latents, where v = -x0 / s; the clean videos that the velocities stand for."""
    run, found = PlanRun(plan, list(range(999, 999 - TOTAL, -1)), guided=False), []
    for index in range(TOTAL):
        step = run.begin(index, torch.zeros_like(clean[index]), LEVELS[index])
        if step.computed:
            run.keep(step, -clean[index] / LEVELS[index].noise)
        found.append(-run.velocity(1.0) * LEVELS[index].noise)
    return run, found


def test_it_computes_the_steps_named_and_reuses_the_last_of_them() -> None:
    clean = [torch.full((1, 2, 3, 4, 5), float(index)) for index in range(TOTAL)]
    run, found = play(Plan(step_cache=StepSchedule(total=TOTAL, steps=(0, 2, 5))), clean)
    assert run.record()["computed"] == [0, 2, 5]
    for got, want in zip(found, (0, 0, 2, 2, 2, 5, 5), strict=True):
        torch.testing.assert_close(got, torch.full_like(got, float(want)))


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_a_trend_goes_on_along_the_angle(share: float) -> None:
    """x0 that moves in proportion to the angle is met exactly by the whole trend."""
    clean = [torch.full((1, 1, 1, 2, 2), level.angle) for level in LEVELS]
    _, found = play(Plan(step_cache=StepSchedule(total=TOTAL, steps=(0, 2), trend=share)), clean)
    torch.testing.assert_close(found[1], clean[0])  # nothing to follow yet
    for index in range(3, TOTAL):
        torch.testing.assert_close(found[index], clean[2] + share * (clean[index] - clean[2]))


def test_every_step_named_leaves_nothing_out() -> None:
    clean = list(torch.randn(TOTAL, 1, 2, 3, 4, 5))
    whole = Plan(step_cache=StepSchedule(total=TOTAL, steps=tuple(range(TOTAL)), trend=0.5))
    run, found = play(whole, clean)
    _, exact = play(Plan(), clean)
    assert run.record()["skipped"] == []
    assert all(torch.equal(got, want) for got, want in zip(found, exact, strict=True))


@pytest.mark.parametrize("power", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("count", range(1, TOTAL + 1))
def test_no_other_list_of_the_length_costs_less(count: int, power: float) -> None:
    generator = torch.Generator().manual_seed(count)
    table = torch.rand(TOTAL, TOTAL, generator=generator, dtype=torch.float64).tolist()
    signals = torch.rand(TOTAL, generator=generator, dtype=torch.float64).tolist()

    def cost(steps: tuple[int, ...]) -> float:
        total, last = 0.0, 0
        for index in range(TOTAL):
            last = index if index in steps else last
            total += 0.0 if index in steps else signals[index] ** power * table[last][index]
        return total

    best = choose_steps(table, signals, count, power=power)
    others = [(0, *rest) for rest in itertools.combinations(range(1, TOTAL), count - 1)]
    assert best in others
    assert cost(best) == pytest.approx(min(map(cost, others)), abs=1e-12)


@pytest.mark.parametrize("count", [0, TOTAL + 1, 1.5])
def test_a_list_of_a_length_that_cannot_be(count: Any) -> None:
    with pytest.raises(InputError, match=r"schedule: count is .* a whole number from 1 to 7"):
        choose_steps([[0.0] * TOTAL] * TOTAL, [0.5] * TOTAL, count)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": ()}, r"schedule: steps is \(\); it must be a list of numbers, not empty"),
        ({"steps": "0"}, "schedule: steps is '0'"),
        ({"steps": (1, 2)}, r"schedule: steps is \(1, 2\); it must rise from 0"),
        ({"steps": (0, 2, 2)}, r"schedule: steps is \(0, 2, 2\); it must rise"),
        ({"steps": (0, 7)}, r"schedule: steps\[1\] is 7; .* from 0 to 6"),
        ({"steps": (0,), "total": 0}, "schedule: total is 0"),
        ({"steps": (0,), "trend": 1.5}, r"schedule: trend is 1\.5; it must be a number from 0 to 1"),
        ({"steps": (0,), "trend": float("nan")}, "schedule: trend is nan"),
    ],
)
def test_wrong_values_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        StepSchedule(**{"total": TOTAL, **fields})


def test_a_request_of_another_length_is_refused() -> None:
    plan = Plan(step_cache=StepSchedule(total=TOTAL, steps=(0, 3)))
    plan.check(steps=TOTAL, guided=False)
    with pytest.raises(
        InputError, match="the list belongs to 7 steps and the request has 8; choose one for 8"
    ):
        plan.check(steps=TOTAL + 1, guided=False)


def test_other_caches_can_follow_a_trend_too() -> None:
    clean = [torch.full((1, 1, 1, 2, 2), level.angle) for level in LEVELS]
    ratios = (1.0,) * TOTAL
    cache = MagCache(threshold=9, warmup=2, last=0, max_skips=None, ratios=ratios, reuse="clean", trend=1.0)
    _, found = play(Plan(step_cache=cache), clean)
    for got, want in zip(found, clean, strict=True):
        torch.testing.assert_close(got, want)
    assert EasyCache(threshold=0.1).trend == 0


def event(index: int, total: int, clean: Tensor, **fields: Any) -> Any:
    prediction = Prediction(torch.zeros_like(clean), LEVELS[index], -clean / LEVELS[index].noise)
    return SimpleNamespace(
        **{"index": index, "total": total, "computed": True, "prediction": prediction, **fields}
    )


def test_changes_are_means_over_runs() -> None:
    recorder = ChangeRecorder()
    for slope in (1.0, 3.0):
        for index in range(TOTAL):
            recorder(event(index, TOTAL, torch.full((1, 1, 1, 2, 2), slope * index)))
    want = [[(1 + 9) / 2 * (t - i) ** 2 if t > i else 0.0 for t in range(TOTAL)] for i in range(TOTAL)]
    torch.testing.assert_close(torch.tensor(recorder.differences), torch.tensor(want))
    assert recorder.signals == [level.signal for level in LEVELS]


def test_changes_of_whole_exact_runs_only() -> None:
    recorder, clean = ChangeRecorder(), torch.zeros(1, 1, 1, 2, 2)
    with pytest.raises(InputError, match="no run was recorded"):
        _ = recorder.differences
    with pytest.raises(InputError, match="step 1 of 7 was not computed; changes are recorded on exact runs"):
        recorder(event(0, TOTAL, clean, computed=False))
    for index in range(TOTAL):
        recorder(event(index, TOTAL, clean))
    recorder(event(0, TOTAL, clean))
    with pytest.raises(InputError, match="the last run ended after 1 steps; record whole runs only"):
        _ = recorder.differences
    with pytest.raises(InputError, match="a run of 5 steps after one of 7; changes belong to one schedule"):
        recorder(event(0, 5, clean))
