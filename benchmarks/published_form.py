"""A pipeline whose loop works as the authors' transformer does: MIF and TAII run again in every step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from proteus_deploy.pipeline import Pipeline

__all__ = ["use_published_form"]

_IDENTITY_STAGES = ("identity_fusion", "identity_schedule")


def use_published_form(pipeline: Pipeline) -> None:
    """Make the pipeline repeat its identity work in every step; videos stay the same.

    For requests of one identity. The pipeline should have the unfolded identity attention of
    `Pipeline.from_checkpoint`, which is the published one.
    """
    stages: Any = pipeline.stages
    remembered = {name: _Remembering(stages[name]) for name in _IDENTITY_STAGES if name in stages}
    for name, stage in remembered.items():
        stages[name] = stage
    stages["denoiser"] = _RepeatingDenoiser(stages["denoiser"], remembered)


class _Remembering:
    """A stage that keeps the inputs of its last call."""

    def __init__(self, stage: Any) -> None:
        self.stage = stage
        self.inputs = stage.inputs
        self.last: dict[str, Tensor] = {}

    def __call__(self, **inputs: Tensor) -> Any:
        self.last = inputs
        return self.stage(**inputs)


class _RepeatingDenoiser:
    """The denoiser, behind MIF and TAII for its own timestep."""

    def __init__(self, stage: Any, identity: Mapping[str, _Remembering]) -> None:
        self.stage = stage
        self.inputs = stage.inputs
        self._identity = identity

    def __call__(self, **inputs: Tensor) -> Any:
        again: dict[str, Tensor] = {}
        if "identity_fusion" in self._identity:
            fusion = self._identity["identity_fusion"]
            again["fused"] = fusion.stage(**fusion.last)["fused"]
        schedule = self._identity["identity_schedule"]
        one_step = {**schedule.last, **again, "timesteps": inputs["timestep"][:1]}
        tokens = schedule.stage(**one_step)["face_tokens"]
        return self.stage(**{**inputs, "face_tokens": tokens})
