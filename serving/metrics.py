"""Prometheus metrics, read from the queue and the workers when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from proteus_deploy.serving.service import Service

__all__ = ["metrics_text"]


class _Queue(Collector):
    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        counts, board = self._service.store.counts(), self._service.board
        jobs = GaugeMetricFamily("proteus_jobs", "Jobs in the database, by state", labels=["state"])
        cost = GaugeMetricFamily(
            "proteus_jobs_cost", "Sum of the jobs' cost (10^6 pixel evaluations), by state", labels=["state"]
        )
        for state, (count, total) in counts.items():
            jobs.add_metric([state], count)
            cost.add_metric([state], total)
        attempts = CounterMetricFamily(
            "proteus_attempts", "Attempts that ended, by outcome", labels=["outcome"]
        )
        seconds = CounterMetricFamily(
            "proteus_attempt_seconds", "Wall seconds of attempts that ended, by outcome", labels=["outcome"]
        )
        for outcome in sorted(board.outcomes):
            attempts.add_metric([outcome], board.outcomes[outcome])
            seconds.add_metric([outcome], board.seconds[outcome])
        yield from (jobs, cost, attempts, seconds)
        supervisor = self._service.supervisor
        yield GaugeMetricFamily(
            "proteus_workers_ready", "Workers with a pipeline in memory", supervisor.ready
        )
        yield CounterMetricFamily("proteus_worker_restarts", "Workers started again", supervisor.restarts)


def metrics_text(service: Service) -> bytes:
    """The metrics in Prometheus' text format."""
    registry = CollectorRegistry()
    registry.register(_Queue(service))
    return generate_latest(registry)
