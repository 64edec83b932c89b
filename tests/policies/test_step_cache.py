"""Step caches on networks with closed forms: what is skipped, and what a skipped step gives."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from proteus_deploy.policies import EasyCache, GuidanceInterval, IdentityGate, MagCache, Plan, TeaCache
from proteus_deploy.policies.plan_run import PlanRun
from proteus_deploy.policies.reuse import REUSES, Levels, Reuse, keep, restore
from proteus_deploy.policies.step_cache import StepCache

STEPS = 10
HALF = Levels(0.8, 0.6)


def play(
    plan: Plan | None,
    latents: Callable[[int], Tensor],
    network: Callable[[int, Tensor], Tensor],
    steps: int = STEPS,
) -> tuple[PlanRun, list[Tensor]]:
    """An unguided run on given latents; the velocities of all steps."""
    run, velocities = PlanRun(plan, [999 - 100 * t for t in range(steps)], guided=False), []
    for index in range(steps):
        step = run.begin(index, latents(index), HALF)
        if step.computed:
            run.keep(step, network(index, step.latents))
        velocities.append(run.velocity(6.0))
    return run, velocities


def at(value: float) -> Tensor:
    return torch.full((1, 2, 3, 4, 5), value)


@pytest.mark.parametrize("reuse", REUSES)
def test_what_is_kept_gives_the_same_velocity_at_the_same_place(reuse: Reuse) -> None:
    latents, velocity = torch.randn(1, 2, 3, 4, 5), torch.randn(1, 2, 3, 4, 5)
    back = restore(reuse, keep(reuse, velocity, latents, HALF), latents, HALF)
    torch.testing.assert_close(back, velocity)


@pytest.mark.parametrize(
    ("reuse", "expected"),
    [
        ("velocity", 3.0),  # v
        ("residual", 5.0 + (3.0 - 2.0)),  # x' + (v - x)
        ("clean", (0.6 * 5.0 - (0.8 * 2.0 - 0.6 * 3.0)) / 0.8),  # (a' x' - (a x - s v)) / s'
    ],
)
def test_a_skipped_step_gives_what_its_formula_says(reuse: Reuse, expected: float) -> None:
    kept = keep(reuse, at(3.0), at(2.0), Levels(0.8, 0.6))
    torch.testing.assert_close(restore(reuse, kept, at(5.0), Levels(0.6, 0.8)), at(expected))


def test_reuse_of_the_clean_video_is_exact_while_it_stays() -> None:
    """x = a x0 + s e has the velocity a e - s x0 at every level of noise."""
    video, noise = torch.randn(2, 1, 2, 3, 4, 5).unbind()
    kept = keep("clean", 0.6 * noise - 0.8 * video, 0.6 * video + 0.8 * noise, Levels(0.6, 0.8))
    again = restore("clean", kept, 0.8 * video + 0.6 * noise, Levels(0.8, 0.6))
    torch.testing.assert_close(again, 0.8 * noise - 0.6 * video)


def test_latents_of_half_precision_are_reused_in_float32() -> None:
    latents = torch.randn(1, 2, 3, 4, 5).bfloat16()
    for reuse in REUSES:
        kept = keep(reuse, at(1.0), latents, HALF)
        assert restore(reuse, kept, latents, HALF).dtype == torch.float32


def test_easycache_adds_up_the_estimate_of_its_formula() -> None:
    """v = 2 x, so k = 2; x grows by 1 a step from 10: step t adds 2 * 1 / |2 * (10 + i)|."""
    plan = Plan(step_cache=EasyCache(threshold=0.15, warmup=2, last=1, reuse="velocity"))
    run, velocities = play(plan, lambda t: at(10.0 + t), lambda _, x: 2 * x)
    # kept step 1, |v| = 22: 1/11 at step 2, 2/11 at step 3. Kept step 3, |v| = 26: 1/13, 2/13 at step 5.
    # Kept step 5, |v| = 30: 1/15, 2/15 at step 7, 3/15 at step 8; step 9 is the last.
    assert run.record()["computed"] == [0, 1, 3, 5, 8, 9]
    assert run.record()["skipped"] == [2, 4, 6, 7]
    assert torch.equal(velocities[2], velocities[1])
    assert torch.equal(velocities[7], velocities[5])
    assert torch.equal(velocities[8], at(36.0))


def test_easycache_measures_its_rate_across_skipped_steps() -> None:
    """From step 4 on the network is twice as steep; the rate of the next computed pair says so."""
    steep = lambda t, x: x if t < 4 else 4 * x - 40  # noqa: E731 - one line, one use
    plan = Plan(step_cache=EasyCache(threshold=0.25, warmup=2, last=0, reuse="velocity"))
    run, _ = play(plan, lambda t: at(10.0 + t), steep)
    # k = 1 at first: kept step 1 (|v| = 11): 1/11, 2/11 at step 3, 3/11 at step 4. There v = 16,
    # k = (16 - 11) / (14 - 11): (5/3) / 16 a step, so steps 5 and 6 are skipped and 7 is not.
    assert run.record()["computed"] == [0, 1, 4, 7, 9]


def test_easycache_computes_where_it_can_say_nothing() -> None:
    still = Plan(step_cache=EasyCache(threshold=9.0, warmup=1, last=0))
    assert play(still, lambda _: at(1.0), lambda _, x: x)[0].record()["skipped"] == []
    zero = Plan(step_cache=EasyCache(threshold=9.0, warmup=1, last=0))
    assert play(zero, lambda t: at(float(t)), lambda _, x: 0 * x)[0].record()["skipped"] == []
    # After one computed step there is no rate: the second is computed, the third need not be.
    first = Plan(step_cache=EasyCache(threshold=9.0, warmup=1, last=0))
    assert play(first, lambda t: at(1.0 + t), lambda _, x: x)[0].record()["computed"] == [0, 1]


def test_magcache_adds_up_the_distance_of_the_product_from_one() -> None:
    ratios = (1.0, *[0.9] * (STEPS - 1))
    plan = Plan(step_cache=MagCache(threshold=0.3, warmup=1, last=1, max_skips=None, ratios=ratios))
    run, _ = play(plan, lambda t: at(1.0 + t), lambda _, x: x)
    # 0.1, 0.1 + 0.19 = 0.29, then 0.29 + 0.271
    assert run.record()["computed"] == [0, 3, 6, 9]


@pytest.mark.parametrize(("most", "computed"), [(1, [0, 2, 4, 6, 8, 9]), (3, [0, 4, 8, 9])])
def test_at_most_so_many_steps_in_a_row_are_skipped(most: int, computed: list[int]) -> None:
    caches: list[StepCache] = [
        MagCache(threshold=1.0, warmup=1, max_skips=most, ratios=(1.0,) * STEPS),
        TeaCache(threshold=1.0, warmup=1, max_skips=most, changes=(0.0,) * STEPS),
    ]
    for cache in caches:
        run, _ = play(Plan(step_cache=cache), lambda t: at(1.0 + t), lambda _, x: x)
        assert run.record()["computed"] == computed


def test_teacache_adds_up_its_polynomial() -> None:
    """p(c) = 2 c^2 + c + 0.5 at c = 0.5 is 1.5; at c = 1 it is 3.5."""
    changes = (0.0, *[0.5] * 4, *[1.0] * 5)
    cache = TeaCache(threshold=4.0, warmup=1, last=0, changes=changes, coefficients=(2.0, 1.0, 0.5))
    run, _ = play(Plan(step_cache=cache), lambda t: at(1.0 + t), lambda _, x: x)
    # steps 1, 2: 1.5, 3.0; step 3: 4.5, computed; step 4: 1.5; step 5: 5, computed; 6: 3.5; 7: 7, computed
    assert run.record()["computed"] == [0, 3, 5, 7, 9]


def test_teacache_never_grows_younger() -> None:
    falling = TeaCache(threshold=0.0, warmup=1, last=0, changes=(0.0,) * STEPS, coefficients=(-1.0,))
    run, _ = play(Plan(step_cache=falling), lambda t: at(1.0 + t), lambda _, x: x)
    assert run.record()["skipped"] == []


@pytest.mark.parametrize(
    "cache",
    [
        EasyCache(threshold=0, warmup=1, last=0),
        MagCache(threshold=0, warmup=1, last=0, ratios=(1.0,) * STEPS),
        TeaCache(threshold=0, warmup=1, last=0, changes=(0.0,) * STEPS),
    ],
    ids=["easycache", "magcache", "teacache"],
)
def test_a_threshold_of_zero_skips_nothing(cache: StepCache) -> None:
    run, velocities = play(Plan(step_cache=cache), lambda t: at(1.0 + t), lambda _, x: x.sin())
    _, exact = play(None, lambda t: at(1.0 + t), lambda _, x: x.sin())
    assert run.record()["skipped"] == []
    assert all(torch.equal(got, want) for got, want in zip(velocities, exact, strict=True))


def test_first_and_last_steps_are_computed() -> None:
    cache = MagCache(threshold=9.0, warmup=4, last=3, max_skips=None, ratios=(1.0,) * STEPS)
    run, _ = play(Plan(step_cache=cache), lambda t: at(1.0 + t), lambda _, x: x)
    assert run.record()["skipped"] == [4, 5, 6]
    run, _ = play(Plan(step_cache=cache), lambda t: at(1.0 + t), lambda _, x: x, steps=5)
    assert run.record()["skipped"] == []


def test_a_kept_result_is_not_used_for_another_gate() -> None:
    cache = MagCache(threshold=9.0, warmup=1, last=0, max_skips=None, ratios=(1.0,) * STEPS)
    plan = Plan(step_cache=cache, identity_gate=IdentityGate(bands=((500, 0.0), (0, 1.0))))
    run, _ = play(plan, lambda t: at(1.0 + t), lambda _, x: x)  # timesteps 999, 899, …; 499 at step 5
    assert run.record()["computed"] == [0, 5]


def test_a_kept_result_without_guidance_is_not_used_where_guidance_acts() -> None:
    cache = MagCache(threshold=9.0, warmup=1, last=0, max_skips=None, ratios=(1.0,) * STEPS)
    plan = Plan(step_cache=cache, guidance_interval=GuidanceInterval(lowest=300, highest=700))
    run = PlanRun(plan, [999 - 100 * t for t in range(STEPS)], guided=True)
    for index in range(STEPS):
        step = run.begin(index, at(1.0 + index), HALF)
        if step.computed:
            velocity = torch.cat([at(1.0), at(3.0)]) if step.both else at(3.0)
            run.keep(step, velocity)
        acts = 300 <= 999 - 100 * index <= 700
        shift = 0.0 if index == 0 else run.prediction().positive.mean() - 3.0
        torch.testing.assert_close(run.velocity(6.0), at(13.0 if acts else 3.0) + shift)
    # 699 is step 3: guidance begins there. After step 6 it ends, and the kept prompt's own result serves.
    assert run.record() == {"computed": [0, 3], "skipped": [1, 2, 4, 5, 6, 7, 8, 9], "both_prompts": [3]}


def test_two_runs_of_one_plan_know_nothing_of_each_other() -> None:
    plan = Plan(step_cache=EasyCache(threshold=0.15, warmup=2, reuse="velocity"))
    alone = [play(plan, lambda t, s=s: at(s + t), lambda _, x: x.sin() + 2)[1] for s in (10.0, 30.0)]  # type: ignore[misc]
    runs = [PlanRun(plan, list(range(STEPS)), guided=False) for _ in range(2)]
    for index in range(STEPS):
        for which, (run, start) in enumerate(zip(runs, (10.0, 30.0), strict=True)):
            step = run.begin(index, at(start + index), HALF)
            if step.computed:
                run.keep(step, step.latents.sin() + 2)
            assert torch.equal(run.velocity(1.0), alone[which][index])


def test_estimates_stay_finite_for_large_latents() -> None:
    plan = Plan(step_cache=EasyCache(threshold=1.0, warmup=2))
    run, velocities = play(plan, lambda t: at(1e30 * (1 + t)), lambda _, x: x)
    assert all(math.isfinite(float(velocity.mean())) for velocity in velocities)
    assert run.record()["computed"][0] == 0
