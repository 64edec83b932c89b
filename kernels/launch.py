"""How Triton kernels are configured, launched, recorded and refused: what every fused operation shares.

Nothing here imports triton before a kernel runs. There is no silent fallback: a fused operation runs its
kernel or raises, and its plain form runs where `backend="reference"` asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from proteus_deploy.errors import BackendError, InputError

Backend = Literal["triton", "reference"]
Grid = Callable[[Mapping[str, int]], tuple[int, ...]]

MAX_WIDTH = 16_384  # of a token that a row kernel keeps in registers
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Shared memory that one block may use, KiB, by compute capability (CUDA programming guide, technical
# specifications per compute capability). Capabilities that aren't listed get the smallest.
SHARED_LIMIT_KIB = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99, 121: 99}


@dataclass(frozen=True)
class LaunchConfig:
    """One point of a kernel's autotune space."""

    blocks: tuple[tuple[str, int], ...]  # the kernel's constexpr arguments that tuning may choose
    warps: int
    stages: int
    shared_kib: int = 0  # most shared memory a block of it takes; the ahead-of-time report holds it to that
    only_on: tuple[int, ...] = ()  # compute capabilities outside which it would spill; empty: everywhere

    def fits(self, capability: int) -> bool:
        """Whether devices of this compute capability (90 for sm_90) have the shared memory and registers."""
        if self.only_on and capability not in self.only_on:
            return False
        return self.shared_kib <= SHARED_LIMIT_KIB.get(capability, min(SHARED_LIMIT_KIB.values()))


@dataclass(frozen=True)
class Launch:
    """A launch that was recorded and not run: what the ahead-of-time compiler needs."""

    kernel: Any
    arguments: Mapping[str, Any]
    space: tuple[LaunchConfig, ...]


_recorded: ContextVar[list[Launch] | None] = ContextVar("recorded launches", default=None)
_autotuning: ContextVar[bool] = ContextVar("autotuning", default=False)


@contextmanager
def autotune() -> Iterator[None]:
    """Kernels that run inside try their whole space at each new size and keep the fastest point.

    Outside, the first point that fits the device runs. Points differ in the order of their sums, so a tuned
    run is not bit for bit the untuned one, and two tunings may choose differently: hence off by default.
    """
    token = _autotuning.set(True)
    try:
        yield
    finally:
        _autotuning.reset(token)


@contextmanager
def record_launches() -> Iterator[list[Launch]]:
    """Launches inside are listed and not run; tensors may then be on the meta device."""
    listed: list[Launch] = []
    token = _recorded.set(listed)
    try:
        yield listed
    finally:
        _recorded.reset(token)


def launch(
    kernel: Any, grid: Grid, arguments: Mapping[str, Any], space: Sequence[LaunchConfig], key: Sequence[str]
) -> None:
    """Run `kernel` once over `grid`, with the first fitting point of `space`, or, tuning, with the best.

    `key` names the arguments at whose change tuning starts again. Raises BackendError where the tensors
    aren't on a device that can run it.
    """
    listed = _recorded.get()
    if listed is not None:
        listed.append(Launch(kernel, dict(arguments), tuple(space)))
        return
    name = kernel.__name__
    device = _common_device(name, [value for value in arguments.values() if isinstance(value, Tensor)])
    if _is_interpreted(kernel):
        # The interpreter ignores warps and stages; the first point stands for all.
        kernel[grid](**arguments, **dict(space[0].blocks))
        return
    if device.type != "cuda":
        raise BackendError(
            f"{name}: the tensors are on {device}, and a Triton kernel runs on CUDA devices. Move them "
            "there, ask for the plain form with backend='reference', or set TRITON_INTERPRET=1 before Python "
            "starts to interpret the kernel, slowly, on the CPU"
        )
    major, minor = torch.cuda.get_device_capability(device)
    fitting = tuple(config for config in space if config.fits(10 * major + minor))
    if not fitting:
        raise BackendError(
            f"{name}: no configuration fits sm_{major}{minor}; the least takes "
            f"{min(config.shared_kib for config in space)} KiB of shared memory. Use backend='reference'"
        )
    with torch.cuda.device(device):
        if _autotuning.get() and len(fitting) > 1:
            _tuned(kernel, fitting, tuple(key))[grid](**arguments)
        else:
            first = fitting[0]
            kernel[grid](**arguments, **dict(first.blocks), num_warps=first.warps, num_stages=first.stages)


@cache
def _tuned(kernel: Any, space: tuple[LaunchConfig, ...], key: tuple[str, ...]) -> Any:
    import triton

    configs = [
        triton.Config(dict(config.blocks), num_warps=config.warps, num_stages=config.stages)
        for config in space
    ]
    return triton.autotune(configs=configs, key=list(key))(kernel)


def _is_interpreted(kernel: Any) -> bool:
    """TRITON_INTERPRET counts when a kernel's module is imported, so ask the kernel, not the variable."""
    from triton.runtime.jit import JITFunction

    return not isinstance(kernel, JITFunction)


def check_kernels_run_on(device: torch.device, way_out: str = "take kernels='reference'") -> None:
    """Raises BackendError, naming `way_out`, where no kernel could run: before any weight is read for it."""
    kernel = load_kernels("proteus_deploy.kernels.modulated_norm.triton").modulated_norm_kernel
    if device.type != "cuda" and not _is_interpreted(kernel):
        raise BackendError(
            f"Triton kernels run on CUDA devices, and the device is {device}; {way_out}, or "
            "set TRITON_INTERPRET=1 before Python starts to interpret them, slowly, on the CPU"
        )


def _common_device(name: str, tensors: Sequence[Tensor]) -> torch.device:
    devices = sorted({str(tensor.device) for tensor in tensors})
    if len(devices) != 1:
        raise InputError(f"{name}: the tensors are on {' and '.join(devices)}; put all on one device")
    return tensors[0].device


def load_kernels(module: str) -> Any:
    """Import a module of kernels. Raises BackendError where triton isn't installed."""
    try:
        return import_module(module)
    except ModuleNotFoundError as missing:
        if (missing.name or "").partition(".")[0] != "triton":
            raise
        raise BackendError(
            "triton isn't installed, and fused operations are written in it: pip install "
            "'proteus-deploy[triton]', or use backend='reference'"
        ) from missing


def check_backend(backend: str) -> None:
    """Raise InputError for a name that isn't one of `Backend`'s."""
    if backend not in get_args(Backend):
        raise InputError(f"backend {backend!r} is unknown; there are {', '.join(get_args(Backend))}")


def check_dtype(name: str, **tensors: Tensor) -> None:
    """Raise InputError where a tensor has a dtype that the kernels don't compute in."""
    for argument, tensor in tensors.items():
        if tensor.dtype not in KERNEL_DTYPES:
            allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in KERNEL_DTYPES)
            raise InputError(
                f"{name}: {argument} is {str(tensor.dtype).removeprefix('torch.')}; the kernel takes "
                f"{allowed}. Convert it, or use backend='reference'"
            )


def check_shape(name: str, argument: str, tensor: Tensor, *expected: int | None) -> None:
    """Raise InputError unless the shape is `expected`; None stands for any size."""
    shape = tuple(tensor.shape)
    same = len(shape) == len(expected) and all(
        want is None or have == want for have, want in zip(shape, expected, strict=True)
    )
    if not same:
        wanted = ", ".join("any" if size is None else str(size) for size in expected)
        raise InputError(f"{name}: {argument} has the shape {list(shape)}, expected [{wanted}]")


def check_streams(name: str, text: Tensor, video: Tensor) -> None:
    """Raise InputError unless text [B, L, d] and video [B, N, d] can stand in one joint sequence."""
    check_shape(name, "video", video, None, None, None)
    check_shape(name, "text", text, video.shape[0], None, video.shape[2])
    if text.dtype != video.dtype:
        raise InputError(f"{name}: text is {text.dtype} and video {video.dtype}; convert one of them")
    if video.shape[2] > MAX_WIDTH:
        raise InputError(
            f"{name}: the width is {video.shape[2]}; the kernel holds a token of at most {MAX_WIDTH} values "
            "in registers. Use backend='reference'"
        )


def check_vectors(name: str, video: Tensor, **vectors: Tensor) -> None:
    """Raise InputError unless weight and bias are [d] and every other vector is [B or 1, 1, d]."""
    batch, _, width = video.shape
    for argument, vector in vectors.items():
        if argument in {"weight", "bias"}:
            check_shape(name, argument, vector, width)
            continue
        shared = vector.ndim == 3 and vector.shape[0] == 1
        check_shape(name, argument, vector, 1 if shared else batch, 1, width)


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number` (1 and up)."""
    return 1 << max(0, number - 1).bit_length()
