"""Families of plans that `tune` searches: of each policy its settings, from careful to bold."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from proteus_deploy.policies.guided_steps import GuidanceInterval, GuidanceReuse
from proteus_deploy.policies.plan import Plan
from proteus_deploy.policies.reuse import REUSES, Reuse
from proteus_deploy.policies.step_cache import EasyCache, MagCache
from proteus_deploy.policies.step_schedule import StepSchedule, choose_steps

if TYPE_CHECKING:
    from proteus_deploy.policies.calibration import ChangeRecorder

__all__ = ["POLICIES", "NamedPlan", "plan_families"]

POLICIES = ("schedule", "easycache", "magcache", "guidance")
NamedPlan = tuple[str, Plan]

_SHARES = (0.5, 0.4, 0.32, 0.26, 0.2, 0.16, 0.12)  # of the steps, computed by a schedule
_POWERS = (1.0, 2.0, 3.0)
_TRENDS = (0.0, 0.25)
_THRESHOLDS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 0.8, 1.0, 1.28)
_EVERY = (2, 3, 4, 6, 10)
_LOWEST = (100, 200, 300, 400, 500, 600, 700, 800, 900)


def plan_families(
    policies: Collection[str],
    ratios: Mapping[Reuse, Sequence[float]],
    changes: ChangeRecorder,
    *,
    guided: bool,
) -> Iterator[list[NamedPlan]]:
    """Named plans of one policy each, from careful to bold, a list for each form of the policy.

    ratios, changes: recorded on the exact runs, for MagCache and for schedules.
    """
    if "schedule" in policies:
        for power, trend in itertools.product(_POWERS, _TRENDS):
            yield _schedules(changes, power, trend)
    for reuse in REUSES:
        if "easycache" in policies:
            yield [
                (f"easycache {reuse} {value:g}", Plan(step_cache=EasyCache(threshold=value, reuse=reuse)))
                for value in _THRESHOLDS
            ]
        if "magcache" in policies:
            yield [_mag_cache(reuse, tuple(ratios[reuse]), value) for value in _THRESHOLDS]
    if guided and "guidance" in policies:
        yield [(f"guidance every {n}", Plan(guidance_reuse=GuidanceReuse(every=n))) for n in _EVERY]
        yield [
            (f"guidance from {low}", Plan(guidance_interval=GuidanceInterval(lowest=low))) for low in _LOWEST
        ]


def _schedules(changes: ChangeRecorder, power: float, trend: float) -> list[NamedPlan]:
    total, plans = len(changes.signals), []
    for count in dict.fromkeys(max(1, round(share * total)) for share in _SHARES):
        steps = choose_steps(changes.differences, changes.signals, count, power=power)
        name = f"schedule {count} power {power:g}" + (f" trend {trend:g}" if trend else "")
        plans.append((name, Plan(step_cache=StepSchedule(total=total, steps=steps, trend=trend))))
    return plans


def _mag_cache(reuse: Reuse, ratios: tuple[float, ...], threshold: float) -> NamedPlan:
    cache = MagCache(threshold=threshold, ratios=ratios, reuse=reuse)
    return f"magcache {reuse} {threshold:g}", Plan(step_cache=cache)
