"""Ray Serve: servers on one machine or many, more of them while jobs wait for long.

Each replica is a whole server with workers of its own. What they share is the database and the results, so
any of them answers for any job, and the death of one costs its running job no more than a new beginning.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count
from typing import TYPE_CHECKING, Any

from proteus_deploy.errors import BackendError, InputError
from proteus_deploy.serving.database import database_url
from proteus_deploy.serving.service import FolderInUse, Service, ServiceSettings, check_model

if TYPE_CHECKING:
    from fastapi import FastAPI
    from ray.serve import Application
    from ray.serve.config import AutoscalingContext

__all__ = ["Replica", "Scale", "application", "serve_on_ray", "wanted_replicas"]

_log = logging.getLogger("proteus_deploy.serving")

_NAME = "proteus-deploy"
_WANTED = "wanted_replicas"
_SHUTDOWN_S = 30.0
# Of one replica at a time: streams of events last as long as their jobs.
_REQUESTS = 1000


@dataclass(frozen=True)
class Scale:
    """How many replicas, and what each of them gets from Ray.

    most: with more than `replicas` there are as many as bring the wait down to `target_wait_s`, between the
    two. cpus: also the threads of a worker. gpus: devices, of which a worker takes the first.
    """

    replicas: int = 1
    most: int | None = None
    target_wait_s: float = 60.0
    cpus: float = 1.0
    gpus: float = 0.0


class Replica:
    """One server. Ray calls the methods by their names."""

    def __init__(self, settings: ServiceSettings, target_wait_s: float) -> None:
        """Returns when the workers have their pipelines. Raises as `Service` and `wait_until_ready` do."""
        from proteus_deploy.serving.logs import write_logs

        write_logs(as_json=settings.log_json)
        self._target_wait_s = target_wait_s
        self.service = _service_in_a_free_folder(settings)
        try:
            self.service.start()
            self.service.supervisor.wait_until_ready()
        except BaseException:
            self.service.close()
            raise

    def __serve_build_asgi_app__(self) -> FastAPI:
        from proteus_deploy.serving.app import create_app

        return create_app(self.service)

    def check_health(self) -> None:
        """Raises BackendError, upon which Ray replaces this replica, when a worker won't be started again."""
        refusal = self.service.supervisor.refusal
        if refusal is not None:
            raise BackendError(refusal)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """How many replicas the whole queue wants, as this one reckons."""
        return {_WANTED: await asyncio.to_thread(self._wanted)}

    def _wanted(self) -> float:
        jobs, seconds = self.service.backlog()
        if seconds is None:  # nothing was measured yet
            return float(jobs)
        return seconds / self._target_wait_s

    def __del__(self) -> None:
        service = self.__dict__.pop("service", None)
        if service is not None:
            service.close()


def _service_in_a_free_folder(settings: ServiceSettings) -> Service:
    """Replicas number their folders, so the next one on a machine takes over what a killed one left."""
    for number in count():
        try:
            return Service(replace(settings, data_dir=settings.data_dir / f"replica-{number}"))
        except FolderInUse:
            continue
    raise AssertionError


def wanted_replicas(context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
    """Ray's policy: the mean of what the replicas reckon; Ray applies the limits and the delays."""
    reckoned = (context.aggregated_metrics or {}).get(_WANTED, {})
    if not reckoned:
        return context.target_num_replicas, {}
    return sum(reckoned.values()) / len(reckoned), {}


def application(settings: ServiceSettings, scale: Scale) -> Application:
    """What `ray.serve.run` takes. Raises InputError for settings that replicas can't share."""
    _check_shared(settings, scale)
    from ray import serve

    size: dict[str, Any] = {"num_replicas": scale.replicas}
    if scale.most is not None:
        size = {
            "autoscaling_config": {
                "min_replicas": scale.replicas,
                "max_replicas": scale.most,
                "policy": {"policy_function": f"{__name__}:{wanted_replicas.__name__}"},
            }
        }
    deployed = serve.deployment(
        name=_NAME,
        max_ongoing_requests=_REQUESTS,
        ray_actor_options={"num_cpus": scale.cpus, "num_gpus": scale.gpus},
        graceful_shutdown_timeout_s=settings.finish_s + _SHUTDOWN_S,
        max_constructor_retry_count=1,
        **size,
    )
    deployment = deployed(serve.ingress()(Replica))
    return deployment.bind(replace(settings, data_dir=settings.data_dir.absolute()), scale.target_wait_s)


def _check_shared(settings: ServiceSettings, scale: Scale) -> None:
    if database_url(settings.database_url, settings.data_dir).get_backend_name() != "postgresql":
        raise InputError(
            "replicas on Ray share their jobs through PostgreSQL, and --database-url names none; write "
            "--database-url postgresql://user:password@host/name"
        )
    if settings.results_url is None:
        raise InputError(
            "any replica on Ray may be asked for any video, so all of them must reach the results; write "
            "--results-url s3://bucket/prefix, or file:///folder for a folder that all machines have mounted"
        )
    if scale.most is not None and scale.most <= scale.replicas:
        raise InputError(
            f"--max-replicas is {scale.most} and --replicas {scale.replicas}; the first must be the larger"
        )


def serve_on_ray(
    settings: ServiceSettings,
    scale: Scale,
    host: str,
    port: int,
    *,
    address: str | None = None,
    on_ready: Callable[[str], None] | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM; call it in the main thread.

    address: of a Ray cluster to join ("auto": this machine's), which keeps its own host and port if it serves
    already; None starts one that ends with this process. on_ready: told the URL when all replicas are up.
    Raises InputError for what can't be served, BackendError when the replicas don't come up.
    """
    check_model(settings)
    app = application(settings, scale)
    # Ray reports its use to its makers unless told otherwise.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray import serve

    # Also where a shell started this in the background, which ignores SIGINT.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        ray.init(address=address or "local", include_dashboard=False, logging_level=logging.WARNING)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise BackendError(f"Ray doesn't start or answer at {address or 'this machine'}: {error}") from error
    try:
        port = port or _free_port(host)
        serve.start(proxy_location="EveryNode", http_options={"host": host, "port": port})
        try:
            serve.run(app, name=_NAME, route_prefix="/")
        except RuntimeError as error:
            raise BackendError(f"the replicas don't come up; see their messages above: {error}") from error
        if on_ready is not None:
            on_ready(f"http://{f'[{host}]' if ':' in host else host}:{port}")
        threading.Event().wait()
    except KeyboardInterrupt:
        _log.info("stopping")
    finally:
        serve.shutdown()  # type: ignore[no-untyped-call]
        ray.shutdown()
        _log.info("stopped")


def _free_port(host: str) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as listener:
        found: int = listener.getsockname()[1]
        return found
