"""OpenTelemetry traces: one span for a job, one for its wait, and one for each stage, below the client's own.

Spans are made when a job ends, from the times that its row and its result hold; so a trace costs the work
nothing, and a job that was made by another server's worker has one too. Stages follow one another, so each
begins where the one before it ended.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from proteus_deploy.errors import BackendError, InputError
from proteus_deploy.serving.jobs import Job, JobState

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

__all__ = ["TRACEPARENT", "Tracer", "open_exporter"]

TRACEPARENT = re.compile(r"00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")  # W3C trace context
_STAGES = ("portrait", "identity", "text", "schedule", "denoise", "decode")
_NS = 1_000_000_000


def open_exporter(where: str) -> SpanExporter:
    """For `where`: an OTLP/HTTP address such as http://collector:4318/v1/traces, or "console".

    Raises InputError for anything else, BackendError where the packages aren't installed.
    """
    if where != "console" and not re.match(r"https?://[^/]", where):
        raise InputError(
            f"traces are to go to {where!r}; write an OTLP address such as http://collector:4318/v1/traces, "
            "or console"
        )
    try:
        if where == "console":
            from opentelemetry.sdk.trace.export import ConsoleSpanExporter

            return ConsoleSpanExporter()
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        return OTLPSpanExporter(endpoint=where)
    except ModuleNotFoundError as error:
        raise BackendError(
            f"traces need the package {error.name}: pip install 'proteus-deploy[serve-traces]'"
        ) from error


class Tracer:
    """Sends spans from a thread of its own; `close` sends the last ones."""

    def __init__(self, exporter: SpanExporter) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        self._provider = TracerProvider(resource=Resource.create({"service.name": "proteus-deploy"}))
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("proteus_deploy.serving")

    def job(self, job: Job) -> None:
        """The spans of a finished job; nothing for one that isn't."""
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        if job.finished_at is None:
            return
        parent = TraceContextTextMapPropagator().extract(
            {"traceparent": job.request.get("traceparent") or ""}
        )
        span = self._tracer.start_span(
            "video",
            parent,
            kind=trace.SpanKind.SERVER,
            start_time=_ns(job.created_at),
            attributes=_attributes(job),
        )
        context = trace.set_span_in_context(span)
        if job.started_at is not None:
            self._part("wait", context, job.created_at, job.started_at)
        if job.result is not None:
            self._stages(job, context, job.result.facts)
        if job.failure is not None:
            span.set_status(trace.StatusCode.ERROR, f"{job.failure.code}: {job.failure.message}")
        span.end(_ns(job.finished_at))

    def _stages(self, job: Job, context: Any, facts: Mapping[str, Any]) -> None:
        assert job.finished_at is not None
        seconds = facts.get("stage_seconds") or {}
        # The last attempt's: it ended when the job did, and what follows the decoder is the file.
        began_s = max(job.finished_at - float(facts.get("seconds", 0.0)), job.started_at or 0.0)
        for stage in _STAGES:
            if stage in seconds:
                ended_s = min(began_s + seconds[stage], job.finished_at)
                self._part(stage, context, began_s, ended_s)
                began_s = ended_s

    def _part(self, name: str, context: Any, began_s: float, ended_s: float) -> None:
        self._tracer.start_span(name, context, start_time=_ns(began_s)).end(_ns(ended_s))

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()


def _ns(seconds: float) -> int:
    return int(seconds * _NS)


def _attributes(job: Job) -> dict[str, str | int | float]:
    found: dict[str, str | int | float] = {
        "proteus.job": job.id,
        "proteus.state": job.state.value,
        "proteus.attempt": job.attempt,
        "proteus.cost": job.cost,
    }
    for name in ("width", "height", "num_frames", "num_inference_steps", "seed"):
        if isinstance(job.request.get(name), int):
            found[f"proteus.{name}"] = job.request[name]
    if job.state is JobState.COMPLETED and job.result is not None:
        found["proteus.batch"] = int(job.result.facts.get("batch", 1))
    return found
