"""How much host memory a TensorRT build will need, and how much there is.

A build is stopped by the kernel, without a word, when memory runs out; so it is predicted first. Figures
behind the rule stand in docs/build.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from proteus_deploy.errors import InputError

# From tensorrt_rtx 1.7.1, by benchmarks/engine_host_memory.py: peak over the process's size before. They are
# bounds on what that measures: beyond base and nodes it is up to 2.82 bytes for a byte of weights.
STREAMED_FACTOR = 3.0  # bytes of host memory for a byte of weights, the mapped ONNX data included
WHOLE_PLAN_FACTOR = 3.3  # the same when the finished plan is returned in memory
BASE_BYTES = 256 << 20
NODE_BYTES = 256 << 10  # for every ONNX node


@dataclass(frozen=True)
class HostMemory:
    """Bytes that a process could still take, and what sets the limit."""

    available: int
    limited_by: str


def predict_bytes(weight_bytes: int, nodes: int, *, streamed: bool) -> int:
    """Host memory that building an engine from that many bytes of ONNX takes, beside what is in use now."""
    factor = STREAMED_FACTOR if streamed else WHOLE_PLAN_FACTOR
    return int(factor * weight_bytes) + NODE_BYTES * nodes + BASE_BYTES


def available(root: Path = Path("/")) -> HostMemory | None:
    """The least of the machine's free memory and the limits of the control groups; None where unknown."""
    found = [HostMemory(_meminfo(root), "the machine")] if (root / "proc/meminfo").is_file() else []
    found += [HostMemory(free, "the container's memory limit") for free in _control_groups(root)]
    return min(found, key=lambda memory: memory.available, default=None)


def check(what: str, predicted: int, memory: HostMemory | None) -> None:
    """Raises InputError when `predicted` bytes are more than there are."""
    if memory is None or predicted <= memory.available:
        return
    raise InputError(
        f"building {what} is predicted to need {predicted / 2**30:.2f} GiB of host memory and "
        f"{memory.available / 2**30:.2f} GiB are available ({memory.limited_by}); use a bigger machine, "
        f"build smaller stages with --stage, or pass --force-memory to try all the same"
    )


class PeakMemory:
    """Context manager: `peak_bytes` is how far the process grew inside it; None where that is unknown."""

    def __init__(self) -> None:
        self.peak_bytes: int | None = None
        self._before = 0

    def __enter__(self) -> Self:
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets VmHWM to VmRSS
        except OSError:
            return self
        self._before = _status("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        if self._before:
            self.peak_bytes = _status("VmHWM") - self._before


def _field(file: Path, name: str) -> int | None:
    for line in file.read_text(encoding="ascii").splitlines():
        words = line.replace(":", " ").split()
        if words[:1] == [name]:
            return int(words[1])
    return None


def _status(name: str) -> int:
    return (_field(Path("/proc/self/status"), name) or 0) * 1024


def _meminfo(root: Path) -> int:
    return (_field(root / "proc/meminfo", "MemAvailable") or 0) * 1024


def _control_groups(root: Path) -> list[int]:
    """Bytes left under each memory limit of this process, control groups v1 and v2, ancestors included."""
    left = []
    membership = root / "proc/self/cgroup"
    for line in membership.read_text().splitlines() if membership.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount, limit, usage = root / "sys/fs/cgroup", "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            mount = root / "sys/fs/cgroup/memory"
            limit, usage = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        group = mount / path.lstrip("/")
        # In a container the path may be the host's; then only the mount itself can be read.
        for folder in (group, *group.parents):
            if folder.is_relative_to(mount):
                free = _left_in(folder, limit, usage)
                left += [free] if free is not None else []
    return left


def _left_in(folder: Path, limit_name: str, usage_name: str) -> int | None:
    try:
        limit = (folder / limit_name).read_text().strip()
        if limit == "max":
            return None
        usage = int((folder / usage_name).read_text())
        # Cached file pages count as usage, but the kernel drops them when memory is asked for.
        reclaimable = _field(folder / "memory.stat", "inactive_file") or 0
    except OSError:
        return None
    return max(int(limit) - usage + reclaimable, 0)
