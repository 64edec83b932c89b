"""Attention for CPUs with AVX512-BF16, as a `torch.library` op: proteus_deploy::joint_attention_cpu.

PyTorch's own attention on a CPU takes its products from a library that reaches a fraction of their rate in
bfloat16 without AMX. `cpu.cpp` computes the same with oneDNN's micro-kernels. Like inductor's kernels, it is
compiled on first use by the C++ compiler of the machine; the library is kept in the user's cache folder.

Axes: B batch, H heads, S joint tokens, D head size. Forward only.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from proteus_deploy._files import atomic_file, cache_folder
from proteus_deploy.errors import BackendError, InputError
from proteus_deploy.kernels.launch import check_shape

__all__ = ["check_runs_here", "cpu_attention"]

_NAME = "CPU attention"
_SOURCE = Path(__file__).with_name("cpu.cpp")
_MAX_HEAD_SIZE = 256
_FLAGS = (
    "-O3", "-march=native", "-std=c++20", "-fPIC", "-fopenmp", "-shared", "-Wl,--as-needed",
    "-fno-math-errno", "-fno-trapping-math",
)  # fmt: skip


def cpu_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt(D)) V, all [B, H, S, D] bfloat16 on the CPU; sums and softmax in float32.

    Any strides; D even, up to 256. The result has the memory order [B, S, H, D] that the output projection
    wants. Raises InputError for other dtypes, devices and shapes, and BackendError where the processor or a
    compiler is missing (see `check_runs_here`).
    """
    result: Tensor = torch.ops.proteus_deploy.joint_attention_cpu(query, key, value)
    return result


@torch.library.custom_op(
    "proteus_deploy::joint_attention_cpu",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value) -> Tensor",
)
def _forward_op(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    _check(query, key, value)
    library = _library()
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    batch, heads, tokens, size = query.shape
    out = query.new_empty(batch, tokens, heads, size).transpose(1, 2)
    tensors = (query, key, value, out)
    failed = library.joint_attention_bf16(
        *(tensor.data_ptr() for tensor in tensors),
        (ctypes.c_int64 * 4)(*query.shape),
        (ctypes.c_int64 * 12)(*(stride for tensor in tensors for stride in tensor.stride()[:3])),
        size**-0.5,
        torch.get_num_threads(),
    )
    if failed:
        raise BackendError(
            f"{_NAME}: no memory for the packed keys and values of {batch} x {heads} heads, {tokens} tokens"
        )
    return out


@_forward_op.register_fake
def _forward_fake(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    _check(query, key, value)
    batch, heads, tokens, size = query.shape
    return query.new_empty(batch, tokens, heads, size).transpose(1, 2)


def _check(query: Tensor, key: Tensor, value: Tensor) -> None:
    check_shape(_NAME, "query", query, None, None, None, None)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dtype != torch.bfloat16 or tensor.device.type != "cpu":
            raise InputError(
                f"{_NAME}: {name} is {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}; it takes "
                "bfloat16 on the CPU. Use the attention 'torch' for anything else"
            )
        check_shape(_NAME, name, tensor, *query.shape)
    size = query.shape[3]
    if size % 2 or not 2 <= size <= _MAX_HEAD_SIZE:
        raise InputError(
            f"{_NAME}: the head size is {size}; it takes an even one from 2 to {_MAX_HEAD_SIZE}. Use the "
            "attention 'torch' for another"
        )
    if 0 in query.shape:
        raise InputError(f"{_NAME}: the shape {list(query.shape)} holds no token to attend to")


def check_runs_here() -> None:
    """Raises BackendError unless the processor has AVX512-BF16 and a C++ compiler is at hand, or fails."""
    _library()


@cache
def _library() -> Any:
    if sys.platform != "linux" or not torch.cpu._is_avx512_bf16_supported():  # noqa: SLF001 - no public name
        raise BackendError(
            f"{_NAME} needs a processor with AVX512-BF16 under Linux, and this one hasn't; use the attention "
            "'torch'"
        )
    torch_folder = Path(torch.__file__).resolve().parent
    compiler = os.environ.get("CXX", "g++")
    command = [
        compiler, *_FLAGS, f"-I{torch_folder / 'include'}", str(_SOURCE),
        f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10", *_openmp(torch_folder),
    ]  # fmt: skip
    # The library is this processor's own (-march=native), and belongs to one PyTorch.
    known = (
        _SOURCE.read_text(),
        torch.__version__,
        torch.backends.cpu.get_cpu_capability(),
        _processor(),
        *command,
    )
    key = hashlib.sha256("\0".join(known).encode()).hexdigest()[:16]
    path = cache_folder("kernels") / f"joint_attention-{key}.so"
    if not path.is_file():
        _compile(command, path)
    library = ctypes.CDLL(str(path))
    library.joint_attention_bf16.restype = ctypes.c_int
    library.joint_attention_bf16.argtypes = [
        *(ctypes.c_void_p,) * 4, ctypes.POINTER(ctypes.c_int64), ctypes.POINTER(ctypes.c_int64),
        ctypes.c_float, ctypes.c_int,
    ]  # fmt: skip
    return library


def _compile(command: list[str], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as partial:
        try:
            # The command is the user's own compiler with fixed flags.
            done = subprocess.run(  # noqa: S603
                [*command, "-o", str(partial)], capture_output=True, text=True, check=False
            )
        except FileNotFoundError as missing:
            raise BackendError(
                f"{_NAME} is compiled on first use, and there is no C++ compiler {command[0]!r}; install one "
                "(Debian: apt install g++), name another in CXX, or use the attention 'torch'"
            ) from missing
        if done.returncode:
            raise BackendError(
                f"{_NAME} could not be compiled by {command[0]}:\n{done.stderr.strip()[-2000:]}"
            )


def _openmp(torch_folder: Path) -> list[str]:
    """PyTorch's own copy of OpenMP: with another, two pools of threads would share the cores."""
    return [str(path) for path in sorted((torch_folder / "lib").glob("libgomp*.so*"))][:1]


def _processor() -> str:
    """Model and instructions as Linux says them: a cache folder may be shared by several machines."""
    lines = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0].splitlines()
    return "\n".join(line for line in lines if line.startswith(("model name", "flags")))
