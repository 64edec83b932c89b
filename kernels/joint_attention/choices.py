"""Every attention that the model can run on, by name, behind one function. Nothing falls back to another.

    attend = attention_with("triton-int8")
    attended = attend(query, key, value)        # all [B, H, S, D]

A further choice is a line of `_CHOICES`: how it is loaded and what it needs. Packages are imported when their
choice is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from proteus_deploy.errors import BackendError
from proteus_deploy.kernels.joint_attention import cpu
from proteus_deploy.kernels.joint_attention.op import fused_attention
from proteus_deploy.kernels.joint_attention.quantised import Product
from proteus_deploy.kernels.joint_attention.reference import attention
from proteus_deploy.kernels.launch import check_kernels_run_on, load_kernels

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class _Choice:
    """load() -> the function. check(device, dtype) raises BackendError where it can't run."""

    load: Callable[[], Attention]
    check: Callable[[torch.device, torch.dtype], None]


def attention_names() -> tuple[str, ...]:
    """What `attention_with` takes, PyTorch's own first."""
    return tuple(_CHOICES)


def attention_with(kernel: str) -> Attention:
    """The attention of that name: query, key, value [B, H, S, D] -> [B, H, S, D], no mask, scores by 1/√D.

    "torch": PyTorch's own, the reference. "cpu-bf16": `cpu_attention`. "triton", "triton-int8",
    "triton-fp8": `fused_attention`.
    "flash-attn" and "sage": the packages flash_attn and sageattention. Sage and the 8-bit forms approximate.

    Raises BackendError for an unknown name or a package that isn't here, and the function does so for tensors
    on a device or in a precision that the choice doesn't run in.
    """
    choice = _choice(kernel)
    run = choice.load()
    if kernel == "torch":
        return run

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        choice.check(query.device, query.dtype)
        return run(query, key, value)

    return attend


def check_attention_runs_on(kernel: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raises BackendError where the choice could not run: before any weight is read for it."""
    choice = _choice(kernel)
    choice.check(device, dtype)
    choice.load()


def _choice(kernel: str) -> _Choice:
    if kernel not in _CHOICES:
        raise BackendError(f"attention {kernel!r} is unknown; there are {', '.join(_CHOICES)}")
    return _CHOICES[kernel]


def _anywhere(device: torch.device, dtype: torch.dtype) -> None:
    del device, dtype


def _triton(product: Product) -> _Choice:
    def check(device: torch.device, dtype: torch.dtype) -> None:
        del dtype
        # Inside a compiled graph the op itself asks again, on real tensors.
        if not torch.compiler.is_compiling():
            check_kernels_run_on(device, "take attention 'torch'")
            load_kernels("proteus_deploy.kernels.joint_attention.triton").check_device(device, product)

    return _Choice(lambda: partial(fused_attention, product=product), check)


def _load_flash() -> Attention:
    run = _package(
        "flash-attn", "flash_attn", "flash_attn_func", "pip install flash-attn --no-build-isolation"
    )

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # It takes and gives [B, S, H, D].
        out: Tensor = run(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), causal=False)
        return out.transpose(1, 2)

    return attend


def _load_sage() -> Attention:
    run = _package("sage", "sageattention", "sageattn", "pip install sageattention")

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # It reads any strides but that of D, which it wants packed.
        packed = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
        out: Tensor = run(*packed, tensor_layout="HND", is_causal=False)
        return out

    return attend


def _package(choice: str, module: str, function: str, install: str) -> Any:
    try:
        return getattr(import_module(module), function)
    except ModuleNotFoundError as missing:
        if (missing.name or "").partition(".")[0] != module:
            raise
        raise BackendError(
            f"attention {choice!r} needs the package {module}, which isn't installed: {install}"
        ) from missing
    except (ImportError, AttributeError) as broken:
        # Compiled for another PyTorch, or a release that has moved the function.
        raise BackendError(
            f"attention {choice!r}: the package {module} is here but gives no {function} ({broken}); "
            f"install one that fits this PyTorch: {install}"
        ) from broken


def _on_cuda_in_half(choice: str) -> Callable[[torch.device, torch.dtype], None]:
    def check(device: torch.device, dtype: torch.dtype) -> None:
        if device.type != "cuda":
            raise BackendError(
                f"attention {choice!r} runs on CUDA devices, and the device is {device}; take 'torch'"
            )
        if dtype not in _HALF:
            raise BackendError(
                f"attention {choice!r} runs in bfloat16 and float16, and the precision is "
                f"{str(dtype).removeprefix('torch.')}; open the model in one of them, or take 'torch'"
            )

    return check


def _load_cpu() -> Attention:
    cpu.check_runs_here()
    return cpu.cpu_attention


def _on_cpu_in_bfloat16(device: torch.device, dtype: torch.dtype) -> None:
    if device.type != "cpu" or dtype != torch.bfloat16:
        raise BackendError(
            f"attention 'cpu-bf16' runs on the CPU in bfloat16, and this is "
            f"{str(dtype).removeprefix('torch.')} on {device}; open the model in bf16 on the "
            "CPU, or take 'torch'"
        )


_CHOICES: Mapping[str, _Choice] = {
    "torch": _Choice(lambda: attention, _anywhere),
    "cpu-bf16": _Choice(_load_cpu, _on_cpu_in_bfloat16),
    "triton": _triton("tokens"),
    "triton-int8": _triton("int8"),
    "triton-fp8": _triton("fp8"),
    "flash-attn": _Choice(_load_flash, _on_cuda_in_half("flash-attn")),
    "sage": _Choice(_load_sage, _on_cuda_in_half("sage")),
}
