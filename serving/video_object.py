"""A job as the API shows it: OpenAI's video object, and facts of our own beside them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from proteus_deploy.serving.jobs import Job, JobState

if TYPE_CHECKING:
    from proteus_deploy.serving.service import Service

__all__ = ["video_object"]

_STATUS = {JobState.RUNNING: "in_progress"}
_SHOWN = (
    "prompt",
    "identity_prompt",
    "width",
    "height",
    "num_frames",
    "fps",
    "num_inference_steps",
    "guidance_scale",
    "seed",
)


def video_object(service: Service, job: Job, *, position: int | None = None) -> dict[str, Any]:
    """JSON of a job. position: jobs that go before it, where that was asked for."""
    request, news = job.request, None
    if job.state is JobState.RUNNING:
        news = service.board.progress(job.id) or job.progress
    progress = 100 if job.state is JobState.COMPLETED else int((news or {}).get("percent", 0))
    error = None if job.failure is None else {"code": job.failure.code, "message": job.failure.message}
    completed = job.finished_at if job.state is JobState.COMPLETED else None
    keep_s = service.settings.keep_s
    document: dict[str, Any] = {
        "id": job.id,
        "object": "video",
        "model": service.settings.model_name,
        "status": _STATUS.get(job.state, job.state.value),
        "progress": progress,
        "created_at": int(job.created_at),
        "completed_at": None if completed is None else int(completed),
        "expires_at": None if completed is None or keep_s is None else int(completed + keep_s),
        "size": f"{request['width']}x{request['height']}",
        "seconds": f"{request['num_frames'] / request['fps']:g}",
        "remixed_from_video_id": None,
        "error": error,
        "cancel_requested": job.cancel_requested,
        "attempt": job.attempt,
    }
    document |= {name: request[name] for name in _SHOWN}
    document |= {"plan": request.get("plan"), "character": request.get("character")}
    document |= {"adapters": request.get("adapters"), "portrait_prompt": request.get("portrait_prompt")}
    if news is not None:
        document["stage"] = {name: news[name] for name in ("stage", "done", "total", "eta_s")}
    if position is not None:
        document["queue_position"] = position
    if job.result is not None:
        document["bytes"], document["sha256"] = job.result.bytes, job.result.sha256
        document["stage_seconds"] = job.result.facts.get("stage_seconds")
        if "portrait_seed" in job.result.facts:
            document["portrait_seed"] = job.result.facts["portrait_seed"]
    return document
