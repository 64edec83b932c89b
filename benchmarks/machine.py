"""What a result file says of where it was made: machine, versions, commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import secrets
import subprocess
from pathlib import Path
from typing import Any

_PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "onnx",
    "onnxruntime",
    "openvino",
    "tensorrt_rtx",
    "tensorrt",
    "triton",
)


def describe_machine() -> dict[str, Any]:
    """Processor, cores, memory in bytes, GPU and system."""
    import torch

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line
        ]
        flags = next((line for line in info.read_text().splitlines() if line.startswith("flags")), "")
        cpu = names[0] if names else cpu
        extensions = [
            name for name in ("amx_bf16", "amx_int8", "avx512_bf16", "avx512f") if name in flags.split()
        ]
    else:
        extensions = []
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "extensions": extensions,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def describe_versions() -> dict[str, str]:
    """Versions of the installed packages that shape a result."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def describe_commit(repository: Path) -> str:
    """The commit of the working tree, with "-dirty" where it has changes; "unknown" outside a clone."""
    try:
        commit = _git(repository, "rev-parse", "HEAD")
        return f"{commit}-dirty" if _git(repository, "status", "--porcelain") else commit
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def describe_code(repository: Path) -> str:
    """By what results of this code can be told from others': the commit, and a word of its own for every call
    in a tree with changes or outside a clone."""
    commit = describe_commit(repository)
    return commit if is_clean(commit) else f"{commit}-{secrets.token_hex(4)}"


def is_clean(commit: str) -> bool:
    """Whether what `describe_commit` said names a commit and nothing else."""
    return not commit.endswith("-dirty") and commit != "unknown"


def _git(repository: Path, *arguments: str) -> str:
    command = ["git", "-C", str(repository), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()  # noqa: S603 - fixed words
