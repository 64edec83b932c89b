"""What does a plan cost in quality, on people that neither training nor the search for the plan has seen?

    python -m proteus_deploy.benchmarks.tiny_model_plan PLAN.json --json FILE [--num-inference-steps N]

One video of each held-out person, exact and under the plan, from the same seed, judged by the budget that
`tune` searched with. Seconds are not measured here: `bench --end-to-end --plan` does that.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from proteus_deploy._files import write_json
from proteus_deploy.benchmarks.machine import describe_commit, describe_machine, describe_versions
from proteus_deploy.benchmarks.plan_trials import PlanTrials, TuningCase
from proteus_deploy.benchmarks.tiny_model_quality import cases
from proteus_deploy.tiny.trained import ENCODERS, GUIDANCE_SCALE, MODEL, NUM_INFERENCE_STEPS
from proteus_deploy.training.avatars import HELD_OUT_SEEDS, make_photo


def drawn_requests(
    people: Sequence[int], *, steps: int = NUM_INFERENCE_STEPS, guidance_scale: float = GUIDANCE_SCALE
) -> list[TuningCase]:
    """A request for each drawn person, each with another movement."""
    from proteus_deploy.request import GenerateRequest

    return [
        TuningCase(
            case.name,
            str(case.person),
            GenerateRequest(
                prompt=case.drawn.prompt,
                identity_prompt=case.drawn.identity_prompt,
                photo=make_photo(case.person, 0).image,
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                seed=case.seed,
            ),
        )
        for case in cases(people, 1)
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Write the result file, print the means. Returns 0; 1 where the plan breaks the budget."""
    import torch

    from proteus_deploy.benchmarks.tuning import DEFAULT_BUDGET
    from proteus_deploy.evaluate.encoders import load_encoders
    from proteus_deploy.pipeline import Pipeline
    from proteus_deploy.policies.plan import read_plan

    arguments = _parser().parse_args(argv)
    plan = read_plan(arguments.plan)
    people = list(HELD_OUT_SEEDS)[: arguments.people]
    requests = drawn_requests(people, steps=arguments.num_inference_steps)
    with Pipeline.from_checkpoint(
        MODEL,
        dtype=arguments.dtype,
        compiled=arguments.backend == "compiled",
        attention=arguments.attention,
        frozen=arguments.frozen,
    ) as pipeline:
        trials = PlanTrials(pipeline, requests, DEFAULT_BUDGET, load_encoders(ENCODERS), _say)
        exact, planned = trials.exact(), trials.trial("planned", plan)
    document = {
        "what": "videos of held-out people under a plan, beside the exact ones of the same seeds",
        "machine": describe_machine(),
        "versions": describe_versions(),
        "commit": describe_commit(Path(__file__).resolve().parents[1]),
        "settings": {
            "people": people,
            "dtype": arguments.dtype,
            "backend": arguments.backend,
            "attention": arguments.attention,
            "frozen": arguments.frozen,
            "threads": torch.get_num_threads(),
            "num_inference_steps": arguments.num_inference_steps,
            "guidance_scale": GUIDANCE_SCALE,
        },
        "exact": exact.to_json(),
        "planned": planned.to_json(),
    }
    write_json(arguments.json, document)
    for name, trial in (("exact", exact), ("planned", planned)):
        figures = ", ".join(f"{metric} {value:.4f}" for metric, value in trial.means.items())
        print(f"{name}: work {trial.work:.3f}, {figures}")
    print("inside the budget" if planned.gate.passed else "breaks the budget")
    return 0 if planned.gate.passed else 1


def _say(phase: str, done: int, total: int) -> None:
    print(f"{phase}: {done}/{total}", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("plan", type=Path, metavar="PLAN.json")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    parser.add_argument("--people", type=int, default=len(HELD_OUT_SEEDS), metavar="N")
    parser.add_argument("--num-inference-steps", type=int, default=NUM_INFERENCE_STEPS, metavar="N")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--backend", choices=("eager", "compiled"), default="eager")
    parser.add_argument("--attention", default="torch", metavar="NAME")
    parser.add_argument("--frozen", action="store_true", help="as for generate")
    return parser


if __name__ == "__main__":
    sys.exit(main())
