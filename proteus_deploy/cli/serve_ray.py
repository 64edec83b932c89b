"""The flags of `proteus-deploy serve --engine ray`."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING

from proteus_deploy.errors import BackendError, InputError

if TYPE_CHECKING:
    from proteus_deploy.serving.service import ServiceSettings

# Flag -> (least value, field of `Scale`).
_NUMBERS = {
    "replicas": (1, "replicas"),
    "max_replicas": (1, "most"),
    "target_wait_seconds": (1, "target_wait_s"),
    "replica_cpus": (0, "cpus"),
    "replica_gpus": (0, "gpus"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments that say how many servers there are."""
    group = parser.add_argument_group(
        "Ray Serve", "several servers behind one address, on one machine or more"
    )
    group.add_argument(
        "--engine", choices=("uvicorn", "ray"), default="uvicorn", help="default: %(default)s, one server"
    )
    group.add_argument("--replicas", type=int, metavar="N", help="servers, each with --workers (default: 1)")
    group.add_argument("--max-replicas", type=int, metavar="N", help="up to so many while jobs wait for long")
    group.add_argument(
        "--target-wait-seconds", type=float, metavar="S", help="how long they may wait then (default: 60)"
    )
    group.add_argument("--replica-cpus", type=float, metavar="N", help="cores of each, from Ray (default: 1)")
    group.add_argument("--replica-gpus", type=float, metavar="N", help="GPUs of each, from Ray (default: 0)")
    group.add_argument(
        "--ray-address", metavar="ADDRESS", help="a Ray cluster to join (default: one is started here)"
    )


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raises InputError for values and combinations that can't be, BackendError when Ray is missing."""
    given = {name: getattr(arguments, name) for name in (*_NUMBERS, "ray_address")}
    given = {name: value for name, value in given.items() if value is not None}
    if arguments.engine != "ray":
        if given:
            flag = next(iter(given)).replace("_", "-")
            raise InputError(f"--{flag} is for Ray; add --engine ray, or leave it out")
        return
    for name, (least, _) in _NUMBERS.items():
        if name in given and not least <= given[name] < float("inf"):
            raise InputError(f"--{name.replace('_', '-')} is {given[name]}; it must be at least {least}")
    if "target_wait_seconds" in given and "max_replicas" not in given:
        raise InputError("--target-wait-seconds says when there are more replicas; name --max-replicas too")
    if importlib.util.find_spec("ray") is None:
        raise BackendError(
            "--engine ray needs the package ray: pip install 'proteus-deploy[serve,serve-ray]'"
        )


def run(settings: ServiceSettings, arguments: argparse.Namespace, *, on_ready: Callable[[str], None]) -> None:
    """Serve until Ctrl-C or SIGTERM. Raises as `serve_on_ray` does."""
    from proteus_deploy.serving.ray_engine import Scale, serve_on_ray

    chosen = {field: getattr(arguments, name) for name, (_, field) in _NUMBERS.items()}
    scale = Scale(**{field: value for field, value in chosen.items() if value is not None})
    address = arguments.ray_address
    serve_on_ray(settings, scale, arguments.host, arguments.port, address=address, on_ready=on_ready)
