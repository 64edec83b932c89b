"""What do MIF's text path, TAII's sense of time and AML do for the tiny model?

    python -m proteus_deploy.benchmarks.tiny_model_ablations TINY_RUN --work DIR --json FILE

Four transformers, smaller than the tiny model's, see the same clips in the same order for the same number of
steps: one as it is, and one each without the part in question. Their videos of held-out people are measured
as `tiny_model_quality` measures the tiny model's. TINY_RUN is the folder of `train --preset tiny`.

    without MIF's text   MIF sees no identity prompt, in training and after
    without TAII's time  TAII is told timestep 0, in training and after
    without AML          every latent counts the same in the loss
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proteus_deploy._files import atomic_directory, write_json
from proteus_deploy.benchmarks import tiny_model_quality as quality
from proteus_deploy.benchmarks.machine import describe_commit, describe_machine, describe_versions
from proteus_deploy.tiny.trained import GUIDANCE_SCALE
from proteus_deploy.training.avatars import HELD_OUT_SEEDS
from proteus_deploy.training.settings import TrainSettings
from proteus_deploy.training.tiny_model.configs import TRAINING, TRANSFORMER

if TYPE_CHECKING:
    from torch import Tensor

    from proteus_deploy.pipeline import Pipeline

_SMALLER = {"num_attention_heads": 4, "num_layers": 4}
_BUDGET: dict[str, Any] = {"steps": 700, "batch_size": 16, "warmup": 100, "ema": 0.995}
_VARIANTS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "without MIF's text": {"fusion_text": False},
    "without TAII's time": {"time_aware": False},
    "without AML": {"aml": False},
}
_FIGURES = (
    "own_relative_to_drawn_clips",
    "own_minus_others_in_standard_errors",
    "nearest_is_right",
    "motion_is_right",
    "clothes_colour_is_right",
    "background_colour_is_right",
    "face_detection_rate",
)


def smaller_base(base: Path, folder: Path) -> Path:
    """The base checkpoint with a smaller transformer to train."""
    if not folder.is_dir():
        with atomic_directory(folder) as new:
            shutil.copytree(base, new, dirs_exist_ok=True)
            width = _SMALLER["num_attention_heads"] * int(TRANSFORMER["attention_head_dim"])
            face = {"FFE_output_dim": width, "LFE_output_dim": width}
            write_json(new / "transformer" / "config.json", {**TRANSFORMER, **_SMALLER, **face})
    return folder


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tiny_run", type=Path, metavar="TINY_RUN")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--people", type=int, default=len(HELD_OUT_SEEDS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--guidance-scale", type=float, default=GUIDANCE_SCALE)
    parser.add_argument("--json", type=Path, required=True)
    given = parser.parse_args(arguments)

    from proteus_deploy.evaluate.encoders import load_encoders
    from proteus_deploy.pipeline import Pipeline
    from proteus_deploy.training.data.cache import PreparedSet
    from proteus_deploy.training.run import RunOptions, run_training
    from proteus_deploy.training.tiny_model.motion_classifier import drawn_motion_classifier

    encoders = load_encoders(given.tiny_run / "encoders")
    classifier = drawn_motion_classifier(given.work / "classifier")
    base = smaller_base(given.tiny_run / "base", given.work / "base")
    clips = PreparedSet.open(given.tiny_run / "encoded")
    budget: TrainSettings = replace(TRAINING, **_BUDGET)
    asked = quality.cases(HELD_OUT_SEEDS[: given.people], given.seeds)
    options = RunOptions(from_scratch=True, dtype="float32", device="cpu", in_memory=True)
    rows = []
    for name, change in _VARIANTS.items():
        folder = given.work / name.replace(" ", "-").replace("'", "")
        print(name, file=sys.stderr, flush=True)
        trained = run_training(base, clips, folder, replace(budget, **change), options=options, report=_say)
        videos = folder / "videos"
        videos.mkdir(exist_ok=True)
        with Pipeline.from_checkpoint(trained) as pipeline:
            _ablate(pipeline, change)
            made = [(case, quality.generate(pipeline, case, given.guidance_scale, videos)) for case in asked]
        figures = quality.measure(made, encoders, classifier)
        figures.pop("videos")
        rows.append({"variant": name, "change": change, "last_loss": _last_loss(folder), **figures})
        print(json.dumps({key: rows[-1][key] for key in _FIGURES}), flush=True)
    document = {
        "what": "ablations of MIF's text path, TAII's time and AML, at smaller scale",
        "machine": describe_machine(),
        "versions": describe_versions(),
        "commit": describe_commit(Path(__file__).resolve().parents[1]),
        "settings": {
            "transformer": _SMALLER,
            "training": asdict(budget),
            "people": given.people,
            "seeds": given.seeds,
            "guidance_scale": given.guidance_scale,
        },
        "rows": rows,
    }
    write_json(given.json, document)
    return 0


class _Changed:
    """A stage whose inputs are changed on the way in."""

    def __init__(self, stage: Any, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
        self.stage, self.change = stage, change
        self.inputs = stage.inputs

    def __call__(self, **inputs: Tensor) -> Any:
        return self.stage(**self.change(inputs))


def _ablate(pipeline: Pipeline, change: Mapping[str, Any]) -> None:
    """Serve a network as it was trained."""
    stages: Any = pipeline.stages
    if not change.get("fusion_text", True):
        stages["identity_fusion"] = _Changed(
            stages["identity_fusion"], lambda all_: {**all_, "identity_text": all_["identity_text"][:, :0]}
        )
    if not change.get("time_aware", True):
        stages["identity_schedule"] = _Changed(
            stages["identity_schedule"], lambda all_: {**all_, "timesteps": 0 * all_["timesteps"]}
        )


def _say(phase: str, done: int, total: int) -> None:
    if done % 100 == 0 or done == total:
        print(f"{phase}: {done}/{total}", file=sys.stderr, flush=True)


def _last_loss(folder: Path) -> dict[str, float]:
    """Of the last tenth of the logged steps: mean unweighted loss, comparable between the variants."""
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    values = [json.loads(line)["unweighted_loss"] for line in lines]
    tail = values[-max(1, len(values) // 10) :]
    return {"unweighted": sum(tail) / len(tail), "lines": len(tail)}


if __name__ == "__main__":
    raise SystemExit(main())
