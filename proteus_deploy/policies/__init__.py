"""What the denoising loop may leave out, each with its own switch; docs/policies.md has the formulas.

A `Plan` says which policies run and with which numbers. It holds no state: what a policy remembers between
steps belongs to one request (`plan_run.PlanRun`), never to the model, the backend or the pipeline.
"""

from __future__ import annotations

from proteus_deploy.policies.guided_steps import GuidanceInterval, GuidanceReuse
from proteus_deploy.policies.identity_gate import IdentityGate
from proteus_deploy.policies.plan import Plan, plan_from_json, read_plan
from proteus_deploy.policies.step_cache import CONSISID_COEFFICIENTS, EasyCache, MagCache, StepCache, TeaCache
from proteus_deploy.policies.step_schedule import StepSchedule, choose_steps

__all__ = [
    "CONSISID_COEFFICIENTS",
    "EasyCache",
    "GuidanceInterval",
    "GuidanceReuse",
    "IdentityGate",
    "MagCache",
    "Plan",
    "StepCache",
    "StepSchedule",
    "TeaCache",
    "choose_steps",
    "plan_from_json",
    "read_plan",
]
