"""A real Triton Inference Server for tests and trials, in an environment of `triton_environments`."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sysconfig
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from proteus_deploy.benchmarks.triton_environments import server_root, site_packages
from proteus_deploy.errors import BackendError

__all__ = ["TritonServer", "triton_server"]

_START_S = 300


@dataclass(frozen=True)
class TritonServer:
    """A running server: its gRPC address for `tritonclient`, its HTTP address, its log."""

    grpc: str
    http: str
    log: Path


@contextmanager
def triton_server(repository: Path, environment: Path) -> Iterator[TritonServer]:
    """A server on a model repository, ready when it is handed over, and gone afterwards.

    environment: as `server_environment` makes it.
    Raises BackendError with the errors of its log where it doesn't come up.
    """
    http, grpc = _free_ports(2)
    prefix = f"proteus-{os.getpid()}-{grpc}"  # of its shared memory, by which servers tell theirs apart
    log = repository.parent / f"{repository.name}.log"
    root = server_root(environment)
    command = [str(root / "bin" / "tritonserver"), "--model-repository", str(repository)]
    command += ["--backend-directory", str(root / "backends"), "--disable-auto-complete-config"]
    command += ["--http-address", "127.0.0.1", "--http-port", str(http)]
    command += ["--grpc-address", "127.0.0.1", "--grpc-port", str(grpc)]
    command += ["--allow-metrics", "false", "--exit-timeout-secs", "10"]
    command += [f"--backend-config=python,shm-region-prefix-name={prefix}"]
    command += [f"--backend-config=python,stub-timeout-seconds={_START_S}"]
    with log.open("wb") as stream:
        process = subprocess.Popen(  # noqa: S603
            command,
            stdout=stream,
            stderr=stream,
            env=_variables(environment),
            cwd=repository.parent,  # which the models' processes have on their path
            start_new_session=True,  # the models' processes end with it
        )
    try:
        server = TritonServer(f"127.0.0.1:{grpc}", f"http://127.0.0.1:{http}", log)
        _wait_for(server, process)
        yield server
    finally:
        _end(process)
        for region in Path("/dev/shm").glob(f"{prefix}*"):  # noqa: S108  where shared memory has its names
            region.unlink()


def _variables(environment: Path) -> dict[str, str]:
    """The models' processes embed Python: they find its library by this, its packages by `python3`."""
    libraries = (site_packages(environment) / "nvidia_pytriton.libs", sysconfig.get_config_var("LIBDIR"))
    return {
        **os.environ,
        "PATH": os.pathsep.join((str(environment / "bin"), os.environ.get("PATH", ""))),
        "LD_LIBRARY_PATH": os.pathsep.join(map(str, libraries)),
    }


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _wait_for(server: TritonServer, process: subprocess.Popen[bytes]) -> None:
    until_s = time.monotonic() + _START_S
    while time.monotonic() < until_s:
        if process.poll() is not None:
            raise BackendError(f"the Triton server ended: {_errors(server.log)}")
        try:
            urllib.request.urlopen(f"{server.http}/v2/health/ready", timeout=5).close()  # noqa: S310
        except OSError:  # not listening, or an answer of 400
            time.sleep(0.1)
        else:
            return
    raise BackendError(f"the Triton server isn't ready after {_START_S} s: {_errors(server.log)}")


def _errors(log: Path) -> str:
    """The lines of a log that Triton marks as errors, else its end."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    marked = [line for line in lines if re.match(r"E[0-9]{4} ", line)]
    return "\n".join(marked or lines[-20:])[:4000]


def _end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # models' processes that are left
