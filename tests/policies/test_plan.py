"""Plans: wrong parameters are refused by name, and JSON gives back what was written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from proteus_deploy import GenerateRequest, InputError
from proteus_deploy.checkpoint import Checkpoint
from proteus_deploy.policies import (
    CONSISID_COEFFICIENTS,
    EasyCache,
    GuidanceInterval,
    GuidanceReuse,
    IdentityGate,
    MagCache,
    Plan,
    StepSchedule,
    TeaCache,
    plan_from_json,
    read_plan,
)
from proteus_deploy.request import request_digest, resolve_request

SmallRequest = Callable[..., GenerateRequest]

EVERYTHING = Plan(
    step_cache=MagCache(threshold=0.1, ratios=(1.0, 0.9), warmup=1, reuse="clean"),
    guidance_interval=GuidanceInterval(lowest=100, highest=900),
    guidance_reuse=GuidanceReuse(every=2),
    identity_gate=IdentityGate(bands=((250, 0.0), (0, 1.0))),
)
NAN, INF = float("nan"), float("inf")
any_plan: Any = Plan

WRONG: list[tuple[Callable[[], object], str]] = [
    (lambda: EasyCache(threshold=-0.1), r"easycache: threshold is -0\.1; .* finite number of at least 0"),
    (lambda: EasyCache(threshold=NAN), "easycache: threshold is nan"),
    (lambda: EasyCache(threshold=INF), "easycache: threshold is inf"),
    (lambda: EasyCache(threshold="0.1"), r"easycache: threshold is '0\.1'"),  # type: ignore[arg-type]
    (lambda: EasyCache(threshold=True), "easycache: threshold is True"),
    (lambda: EasyCache(threshold=1, warmup=0), "warmup is 0; it must be a whole number at least 1"),
    (lambda: EasyCache(threshold=1, warmup=1.0), r"warmup is 1\.0"),  # type: ignore[arg-type]
    (lambda: EasyCache(threshold=1, last=-1), "last is -1; it must be a whole number at least 0"),
    (lambda: EasyCache(threshold=1, max_skips=0), "max_skips is 0; it must be a whole number at least 1"),
    (lambda: EasyCache(threshold=1, reuse="x"), "reuse is 'x'; choose from residual, velocity, clean"),  # type: ignore[arg-type]
    (lambda: MagCache(threshold=1, ratios=()), r"magcache: ratios is \(\); .* list of numbers, not empty"),
    (lambda: MagCache(threshold=1, ratios="1"), "magcache: ratios is '1'; .* list of numbers"),  # type: ignore[arg-type]
    (lambda: MagCache(threshold=1, ratios=(1, -1)), r"magcache: ratios\[1\] is -1; .* at least 0"),
    (lambda: TeaCache(threshold=1, changes=(0, NAN)), r"teacache: changes\[1\] is nan"),
    (lambda: TeaCache(threshold=1, changes=(0,), coefficients=()), r"teacache: coefficients is \(\)"),
    (lambda: GuidanceInterval(lowest=-1), "guidance_interval: lowest is -1; .* from 0 to 999"),
    (lambda: GuidanceInterval(highest=1000), "guidance_interval: highest is 1000; .* from 0 to 999"),
    (lambda: GuidanceInterval(lowest=9, highest=8), "lowest is 9 and highest 8; .* swap them"),
    (lambda: GuidanceReuse(every=0), "guidance_reuse: every is 0; .* at least 1"),
    (lambda: GuidanceReuse(every=2, warmup=0), "guidance_reuse: warmup is 0; .* at least 1"),
    (lambda: GuidanceReuse(every=2, last=-1), "guidance_reuse: last is -1; .* at least 0"),
    (lambda: IdentityGate(bands=()), r"identity_gate: bands is \(\); .* list of \(lowest timestep"),
    (lambda: IdentityGate(bands=((250, 0.0),)), r"begin at timesteps \[250\]; they must fall and end at 0"),
    (lambda: IdentityGate(bands=((0, 1), (0, 0))), r"begin at timesteps \[0, 0\]"),
    (lambda: IdentityGate(bands=((1000, 1), (0, 0))), r"bands\[0\]\[0\] is 1000; .* from 0 to 999"),
    (lambda: IdentityGate(bands=((0, -1.0),)), r"bands\[0\]\[1\] is -1\.0; .* at least 0"),
    (lambda: IdentityGate(bands=((0,),)), r"bands\[0\] is \(0,\); it must be \(lowest timestep, factor\)"),  # type: ignore[arg-type]
    (lambda: IdentityGate(bands=(3,)), r"bands\[0\] is 3"),  # type: ignore[arg-type]
    (lambda: any_plan(step_cache="easycache"), "step_cache is 'easycache'; pass one of EasyCache, MagCache"),
    (lambda: any_plan(guidance_reuse=1), "plan: guidance_reuse is 1; pass an instance of GuidanceReuse, or"),
    (lambda: any_plan(identity_gate=1.0), r"plan: identity_gate is 1\.0; pass an instance of IdentityGate"),
]


@pytest.mark.parametrize(("make", "message"), WRONG, ids=range(len(WRONG)))
def test_a_wrong_parameter_is_named_with_its_rule(make: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_numpy_numbers_and_lists_become_pythons() -> None:
    cache = MagCache(threshold=np.float32(0.5), ratios=[1, np.float64(0.5)], warmup=np.int64(2))  # type: ignore[arg-type]
    assert cache == MagCache(threshold=0.5, ratios=(1.0, 0.5), warmup=2)
    assert json.loads(json.dumps(Plan(step_cache=cache).to_json()))["step_cache"]["ratios"] == [1.0, 0.5]


@pytest.mark.parametrize(
    "plan",
    [
        Plan(),
        EVERYTHING,
        Plan(step_cache=EasyCache(threshold=0.05, max_skips=2)),
        Plan(step_cache=TeaCache(threshold=0.1, changes=(0.0, 0.2, 0.1))),
        Plan(step_cache=StepSchedule(total=9, steps=(0, 3, 8), trend=0.25)),
    ],
    ids=["exact", "everything", "easycache", "teacache", "schedule"],
)
def test_json_gives_the_plan_back(plan: Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    again = read_plan(tmp_path / "plan.json")
    assert again == plan
    assert hash(again) == hash(plan)


def test_a_plan_can_be_written_by_hand() -> None:
    plan = plan_from_json({"step_cache": {"kind": "easycache", "threshold": 0.1}, "guidance_reuse": None})
    assert plan == Plan(step_cache=EasyCache(threshold=0.1))
    tea = plan_from_json({"step_cache": {"kind": "teacache", "threshold": 1, "changes": [0, 1]}}).step_cache
    assert isinstance(tea, TeaCache)
    assert tea.coefficients == CONSISID_COEFFICIENTS


def test_the_plan_on_the_page_is_one(repository: Path) -> None:
    page = (repository / "docs" / "policies.md").read_text(encoding="utf-8")
    plan = plan_from_json(json.loads(page.split("```json")[1].split("```")[0]))
    assert None not in (plan.step_cache, plan.guidance_interval, plan.guidance_reuse, plan.identity_gate)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], r"p\.json: a plan is \[\]; it must be a JSON object"),
        ({"kind": "recipe"}, r"p\.json: 'kind' is 'recipe'; this release reads 'proteus_deploy plan'"),
        ({"schema_version": 2}, r"p\.json: 'schema_version' is 2; this release reads 1"),
        ({"stepcache": {}}, r"p\.json: there is no 'stepcache'; it has step_cache, guidance_interval, "),
        ({"step_cache": 1}, r"p\.json: step_cache is 1; it must be a JSON object"),
        ({"step_cache": {"threshold": 1}}, "kind is None; choose from easycache, magcache, teacache"),
        ({"step_cache": {"kind": ["x"]}}, r"kind is \['x'\]; choose from easycache"),
        ({"step_cache": {"kind": "easycache"}}, "step_cache: missing 1 required .* 'threshold'; add it"),
        (
            {"step_cache": {"kind": "easycache", "k": 1}},
            "step_cache: there is no 'k'; it has reuse, trend, threshold, ",
        ),
        ({"step_cache": {"kind": "easycache", "threshold": -1}}, r"p\.json: easycache: threshold is -1"),
        ({"guidance_reuse": {"every": 2, "kind": "x"}}, "guidance_reuse: there is no 'kind'"),
    ],
)
def test_a_wrong_document_is_refused_by_name(document: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan_from_json(document, source="p.json")


def test_a_file_that_is_no_plan_is_refused(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(InputError, match=r"plan\.json is not readable JSON"):
        read_plan(tmp_path / "plan.json")
    with pytest.raises(InputError, match=r"absent\.json is missing"):
        read_plan(tmp_path / "absent.json")


@pytest.mark.parametrize(
    ("plan", "fields", "message"),
    [
        (EVERYTHING, {"num_inference_steps": 3}, "magcache: ratios has 2 entries and the request 3 steps"),
        (Plan(step_cache=TeaCache(threshold=1, changes=(0,))), {}, "teacache: changes has 1 entries and"),
        (
            EVERYTHING,
            {"guidance_scale": 1.0},
            "the plan has guidance_interval, and guidance_scale is 1 or less",
        ),
        ({"step_cache": None}, {}, "plan is .*; pass a Plan"),
    ],
)
def test_a_plan_must_fit_its_request(
    parity: Path, small_request: SmallRequest, plan: Any, fields: dict[str, Any], message: str
) -> None:
    config = Checkpoint.open(parity / "checkpoint").transformer
    with pytest.raises(InputError, match=message):
        resolve_request(small_request(plan=plan, **fields), config)


def test_a_request_records_its_plan(small_request: SmallRequest) -> None:
    document = json.loads(json.dumps(request_digest(small_request(plan=EVERYTHING))))
    assert plan_from_json(document["plan"]) == EVERYTHING
    assert "plan" not in request_digest(small_request())


def test_the_gate_follows_its_bands() -> None:
    gate = IdentityGate(bands=((750, 0.0), (250, 0.5), (0, 1.0)))
    assert [gate.factor(t) for t in (999, 750, 749, 250, 249, 0)] == [0.0, 0.0, 0.5, 0.5, 1.0, 1.0]


def test_the_interval_includes_its_ends() -> None:
    interval = GuidanceInterval(lowest=200, highest=800)
    assert [interval.contains(t) for t in (801, 800, 200, 199)] == [False, True, True, False]
