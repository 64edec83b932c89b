"""The pipeline that a worker holds: opened, tried with one step, and given the fields of a job."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from proteus_deploy.pipeline import Pipeline
    from proteus_deploy.serving.messages import PipelineChoice
    from proteus_deploy.stage_cache import StageCache

__all__ = ["open_pipeline", "request_fields", "warm_up"]


def open_pipeline(choice: PipelineChoice, cache: StageCache | None = None) -> Pipeline:
    """The pipeline of a bundle or checkpoint. Raises InputError's kinds for what can't run here."""
    from proteus_deploy.pipeline import Pipeline

    if choice.kind == "bundle":
        return Pipeline.from_bundle(
            choice.folder,
            backend=choice.backend or "onnxruntime",
            device=choice.device,
            vae_tiling=choice.vae_tiling,
            low_memory=choice.low_memory,
            cache=cache,
        )
    return Pipeline.from_checkpoint(
        choice.folder,
        device=choice.device or "cpu",
        dtype=choice.dtype,
        compiled=choice.backend == "compiled",
        frozen=choice.frozen,
        attention=choice.attention,
        vae_tiling=choice.vae_tiling,
        low_memory=choice.low_memory,
        cache=cache,
    )


def warm_up(pipeline: Pipeline) -> None:
    """One step and its decoding, at the tuned size, from made-up identity features.

    Raises what `Pipeline.generate` raises: a model that can't make a video says so before the first job.
    """
    from proteus_deploy.export.reference import reference_request

    request, noise = reference_request(pipeline.backend.table, pipeline)
    # Without a control video: no job has one, so its networks needn't be there.
    pipeline.generate(replace(request, num_inference_steps=1, control=None), initial_latents=noise)


def request_fields(document: Any) -> dict[str, Any]:
    """The fields of a GenerateRequest from a job's JSON, but for its photo (or portrait) and adapters."""
    from proteus_deploy.policies.plan import plan_from_json

    others = ("character", "traceparent", "adapters", "portrait_prompt")
    fields = {name: value for name, value in document.items() if name not in others}
    if fields.get("plan") is not None:
        fields["plan"] = plan_from_json(fields["plan"])
    return fields
