"""Environments of their own for Triton's server and its client, which don't go with this package's pins.

The server is that of the wheel `nvidia-pytriton`: it needs no GPU, and holds the Python backend and no other,
which is built for NumPy 1. The client wants an older protobuf than ONNX's newest.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from proteus_deploy.errors import BackendError

__all__ = ["NotInstallable", "client_environment", "server_environment", "server_root", "site_packages"]

_SERVER = "nvidia-pytriton==0.7.0"
_CLIENT = "tritonclient[grpc]==2.73.0"
_EXTRAS = ("onnx", "face")
# Instead of the pins of constraints.txt: the newest that take NumPy 1.
_OLDER = {"ml-dtypes": "0.5.4", "numpy": "1.26.4", "opencv-python": "4.11.0.86"}


class NotInstallable(BackendError):
    """The server or the client can't be fetched here."""


def client_environment(folder: Path) -> Path:
    """An environment with `tritonclient` in `folder`, made where it isn't there; its interpreter.

    Raises NotInstallable.
    """
    with _environment(folder, [_CLIENT]) as is_new:
        if is_new and (failure := _pip(folder, _CLIENT)):
            raise NotInstallable(f"{_CLIENT} can't be installed here: {failure}")
    return folder / "bin" / "python"


def server_environment(folder: Path, source: Path) -> Path:
    """An environment with the server in `folder`, made where it isn't there or what it needs has changed.

    source: a checkout, for pyproject.toml and constraints.txt, whose package the environment imports.
    Raises NotInstallable where the server can't be fetched, BackendError where the rest doesn't install.
    """
    requirements, pins = _requirements(source), _pins(source)
    with _environment(folder, [_SERVER, str(source), *requirements, *pins]) as is_new:
        if not is_new:
            return folder
        # Without its dependencies: they are those of a way to write models that isn't used here.
        if failure := _pip(folder, "--no-deps", _SERVER):
            raise NotInstallable(f"{_SERVER} can't be installed here: {failure}")
        constraints = folder / "constraints.txt"
        constraints.write_text("\n".join(pins) + "\n")
        if failure := _pip(folder, "-c", str(constraints), *requirements):
            raise BackendError(f"the server's environment can't be made: {failure}")
        _place_stub(folder)
        # Not by PYTHONPATH, which the processes of the Python backend ignore.
        (site_packages(folder) / "proteus_deploy_checkout.pth").write_text(f"{source}\n")
    return folder


def site_packages(environment: Path) -> Path:
    """Where the packages of a virtual environment lie."""
    return Path(sysconfig.get_path("purelib", "venv", {"base": str(environment)}))


def server_root(environment: Path) -> Path:
    """The folder of the server's program and backends."""
    return site_packages(environment) / "pytriton" / "tritonserver"


@contextmanager
def _environment(folder: Path, contents: Sequence[str]) -> Iterator[bool]:
    """Whether the environment must be filled: it is new then, and complete once this is left without error.

    Several processes may ask for one at the same time: the first makes it, the others wait.
    """
    wanted = hashlib.sha256("\n".join((sys.version, *contents)).encode()).hexdigest()
    stamp = folder / "complete"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if stamp.is_file() and stamp.read_text() == wanted:
            yield False
            return
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)  # noqa: S603
        yield True
        stamp.write_text(wanted)


def _requirements(source: Path) -> list[str]:
    with (source / "pyproject.toml").open("rb") as stream:
        project = tomllib.load(stream)["project"]
    extras = [one for extra in _EXTRAS for one in project["optional-dependencies"][extra]]
    return [*project["dependencies"], *extras]


def _pins(source: Path) -> list[str]:
    lines = (source / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    return [f"{name}=={version}" for name, version in (pins | _OLDER).items()]


def _pip(environment: Path, *words: str) -> str:
    """Install; why it failed, else nothing."""
    command = [str(environment / "bin" / "python"), "-m", "pip", "install", "--quiet", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode == 0:
        return ""
    lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
    return "; ".join(lines)[:2000] or f"pip ended with {done.returncode}: {done.stderr[-500:]}"


def _place_stub(environment: Path) -> None:
    """The backend starts the program beside it: the one for this version of Python."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = server_root(environment) / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.is_file():
        raise NotInstallable(f"{_SERVER} has no program for Python {version}")
    shutil.copy(stub, server_root(environment) / "backends" / "python" / stub.name)
