"""Spans of a job: its wait, its stages, its failure, below the client's own span."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from proteus_deploy.errors import InputError
from proteus_deploy.serving.jobs import Job, JobFailure, JobResult, JobState
from proteus_deploy.serving.service import Service
from proteus_deploy.serving.traces import Tracer, open_exporter

pytest.importorskip(
    "opentelemetry.sdk", reason="opentelemetry-sdk isn't installed: proteus-deploy[serve-traces]"
)

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
FACTS = {
    "seconds": 6.0,
    "batch": 2,
    "stage_seconds": {"identity": 1.0, "text": 0.5, "denoise": 4.0, "decode": 0.25},
}


def _job(**changes: Any) -> Job:
    fields: dict[str, Any] = {
        "number": 1, "id": "video_0", "owner": "anna", "state": JobState.COMPLETED, "cost": 2.0, "attempt": 1,
        "request": {"seed": 7, "width": 96, "traceparent": PARENT}, "created_at": 100.0, "started_at": 103.0,
        "finished_at": 109.5, "result": JobResult("video_0-1.mp4", 1, "0", FACTS),
    }  # fmt: skip
    return Job(**fields | changes)


def _spans(*jobs: Job) -> dict[str, Any]:
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    tracer = Tracer(exporter)
    for job in jobs:
        tracer.job(job)
    tracer._provider.force_flush()
    found = {span.name: span for span in exporter.get_finished_spans()}
    tracer.close()
    return found


def test_spans_of_a_video() -> None:
    spans = _spans(_job())
    assert set(spans) == {"video", "wait", "identity", "text", "denoise", "decode"}
    video = spans["video"]
    assert f"{video.context.trace_id:032x}" == PARENT[3:35]
    assert f"{video.parent.span_id:016x}" == PARENT[36:52]
    assert (video.attributes["proteus.seed"], video.attributes["proteus.batch"]) == (7, 2)
    seconds = {
        name: ((span.start_time - 100e9) / 1e9, (span.end_time - 100e9) / 1e9) for name, span in spans.items()
    }
    assert seconds["video"] == (0.0, 9.5)
    assert seconds["wait"] == (0.0, 3.0)
    assert seconds["identity"] == (3.5, 4.5)
    assert seconds["denoise"] == (5.0, 9.0)
    assert seconds["decode"] == (9.0, 9.25)
    assert {span.parent.span_id for name, span in spans.items() if name != "video"} == {video.context.span_id}


def test_a_failure_is_an_error_and_a_running_job_nothing() -> None:
    from opentelemetry.trace import StatusCode

    failed = _job(
        state=JobState.FAILED, result=None, failure=JobFailure("invalid_request", "no face"), request={}
    )
    spans = _spans(failed, _job(state=JobState.RUNNING, finished_at=None))
    assert set(spans) == {"video", "wait"}
    assert spans["video"].status.status_code is StatusCode.ERROR
    assert spans["video"].status.description == "invalid_request: no face"
    assert spans["video"].parent is None


def test_a_header_travels_with_the_job(create: Any, service: Service) -> None:
    from proteus_deploy.serving.worker_pipeline import request_fields

    for sent, kept in ((PARENT, PARENT), ("00-xyz", None), ("x" * 9000, None)):
        create({"traceparent": sent})
        claim = service.store.claim("w", lease_s=60)
        assert claim is not None
        assert claim.job.request.get("traceparent") == kept
        assert "traceparent" not in request_fields(claim.job.request)


def test_where_spans_go(tmp_path: Path) -> None:
    for wrong in ("collector:4318", str(tmp_path), ""):
        with pytest.raises(InputError, match="write an OTLP address"):
            open_exporter(wrong)
    open_exporter("http://127.0.0.1:4318/v1/traces").shutdown()
