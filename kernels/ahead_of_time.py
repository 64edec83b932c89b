"""Compile the Triton kernels for named GPUs without having one, and read what they take.

The launches are those of the published size (49 frames of 480x720, guidance as a batch of two; for a cache
LlamaGen-XL's heads and half of an image's positions), recorded on the meta device, so that the signatures
compiled here are those that a GPU would ask for. Registers and local
memory are read from the finished cubin by the `cuobjdump` that Triton ships; local memory is where registers
spill to, and the kernels use none otherwise. Shared memory is in Triton's own metadata.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from proteus_deploy.errors import BackendError
from proteus_deploy.kernels.launch import (
    SHARED_LIMIT_KIB,
    Launch,
    LaunchConfig,
    load_kernels,
    record_launches,
)

TARGETS = (80, 89, 90, 100, 120)

# Batch, tokens, width, heads and head size of CogVideoX-5B; identity heads and face tokens of Proteus-ID.
_B, _L, _N, _D, _H, _HEAD, _ID_HEADS, _Q = 2, 226, 17_550, 3072, 48, 64, 16, 32
# Slots of a cache (a caption and half of 32 x 32 tokens), heads; sequences of 32 images with guidance.
_SLOTS, _CACHE_HEADS, _SEQUENCES = 632, 20, 64

_POINTERS = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16",
    torch.int8: "*i8", torch.float8_e4m3fn: "*fp8e4nv", torch.int32: "*i32", torch.bool: "*i1",
}  # fmt: skip


@dataclass(frozen=True)
class KernelResources:
    """What one kernel takes at one point of its space on one target."""

    kernel: str
    target: str  # sm_90
    dtype: str  # of the tokens; of two kinds, "first and second"
    blocks: dict[str, int]
    warps: int
    stages: int
    default: bool  # whether this is the point that runs without tuning
    status: str  # "ok", "spills", "too much shared memory" or "failed"
    registers: int | None = None  # of one thread
    local_bytes: int | None = None  # of one thread: spilled registers
    shared_bytes: int | None = None  # of one block
    reason: str | None = None


def published_launches(dtype: torch.dtype = torch.bfloat16) -> tuple[Launch, ...]:
    """The launches of every kernel at the published size, tokens and weights in `dtype`."""

    def empty(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=kind, device="meta")

    def run(module: str, function: str, *arguments: Any, **options: Any) -> None:
        getattr(load_kernels(f"proteus_deploy.kernels.{module}"), function)(*arguments, **options)

    columns = _ID_HEADS * _Q
    # A as `fold_identity_attention` leaves it: a transposed view.
    small = (empty(1, columns, _D).mT, empty(1, 1, columns), empty(1, columns, _D))
    hidden, gate = empty(_B, _N, _D), empty(1, kind=torch.float32)
    text, vectors = empty(_B, _L, _D), empty(_B, 1, 6 * _D).chunk(6, dim=-1)
    affine = (empty(_D), empty(_D))
    joint = empty(_B, _L + _N, _D)
    heads = joint.unflatten(-1, (_H, _HEAD)).transpose(1, 2)
    head_affine, tables = [empty(_HEAD)] * 4, [empty(_N, _HEAD, kind=torch.float32)] * 2
    with record_launches() as launches:
        run("identity_attention.triton", "forward", hidden, *small, gate, _ID_HEADS, 1e-5)
        run(
            "identity_attention.triton_backward", "backward", hidden, hidden, *small, gate, _ID_HEADS, 1e-5,
            gate_grad=True, small_grad=True,
        )  # fmt: skip
        run("modulated_norm.triton", "forward", text, hidden, *vectors[:4], *affine, 1e-5)
        run("qk_norm_rotary.triton", "forward", heads, heads, *head_affine, *tables, 1e-6)
        run("gated_residual_norm.triton", "forward", text, hidden, joint, *vectors, *affine, 1e-5)
        for product in ("tokens", "int8", "fp8"):  # the 8-bit forms record their rounding as well
            run("joint_attention.triton", "forward", heads, heads, heads, product)
        # As a cache calls it; and for one image, in splits, with keys that four queries share.
        for sequences, groups in ((_SEQUENCES, _CACHE_HEADS), (_B, _CACHE_HEADS // 4)):
            cached = empty(sequences, groups, _SLOTS, _HEAD)
            query = empty(sequences, _CACHE_HEADS, _HEAD)
            along = empty(sequences, groups, _HEAD, kind=torch.float32)
            lengths, seen = None, None
            if groups != _CACHE_HEADS:
                lengths = empty(sequences, kind=torch.int32)
                seen = empty(sequences, _SLOTS, kind=torch.bool)
            run(
                "decode_attention.triton", "forward", query, cached, cached, lengths, _SLOTS, along, seen,
                _HEAD**-0.5, per_head=False,
            )  # fmt: skip
    return tuple(launches)


def kernel_resources(
    launches: Sequence[Launch], targets: Sequence[int] = TARGETS, *, defaults_only: bool = False
) -> Iterator[KernelResources]:
    """Compile each launch for each target, at every point of its space that fits, or at the default alone.

    Raises BackendError where triton is absent or interprets kernels instead of compiling them.
    """
    _check_compiles()
    for launch in launches:
        for target in targets:
            fitting = [config for config in launch.space if config.fits(target)]
            for config in fitting[:1] if defaults_only else fitting:
                yield _compile(launch, config, target, default=config is fitting[0])


def markdown_table(rows: Sequence[KernelResources]) -> str:
    """One line for each row; the default point of each kernel and target in bold."""
    head = (
        "kernel | target | dtype | blocks | warps | stages | registers | spilled bytes | shared KiB | status"
    )
    lines = [f"| {head} |", "|" + "---|" * 10]
    for row in rows:
        blocks = ", ".join(f"{name} {size}" for name, size in row.blocks.items())
        shared = "" if row.shared_bytes is None else f"{row.shared_bytes / 1024:.1f}"
        name = f"**{row.kernel}**" if row.default else row.kernel
        cells = (
            name, row.target, row.dtype, blocks, row.warps, row.stages,
            "" if row.registers is None else row.registers,
            "" if row.local_bytes is None else row.local_bytes, shared, row.reason or row.status,
        )  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def as_document(rows: Sequence[KernelResources]) -> list[dict[str, Any]]:
    """The rows for a JSON file."""
    return [asdict(row) for row in rows]


def _check_compiles() -> None:
    parts = load_kernels("proteus_deploy.kernels.triton_parts")
    if parts.INTERPRETED.value:
        raise BackendError("TRITON_INTERPRET=1 interprets kernels; unset it to compile them")


def _signature(
    launch: Launch, config: LaunchConfig
) -> tuple[dict[str, str], dict[tuple[int, ...], Any], dict[tuple[int, ...], list[list[Any]]]]:
    """Types, constants and divisibility as the just-in-time compiler would take them from the arguments."""
    types: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    hints: dict[tuple[int, ...], list[list[Any]]] = {}
    given = {**launch.arguments, **dict(config.blocks)}
    for parameter in launch.kernel.params:
        value, at = given[parameter.name], (parameter.num,)
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            types[parameter.name], constants[at] = "constexpr", value
        elif isinstance(value, Tensor):
            types[parameter.name], hints[at] = _POINTERS[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, float):
            types[parameter.name] = "fp32"
        else:
            types[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0:
                hints[at] = [["tt.divisibility", 16]]
    return types, constants, hints


def _compile(launch: Launch, config: LaunchConfig, target: int, *, default: bool) -> KernelResources:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    row: dict[str, Any] = {
        "kernel": launch.kernel.__name__, "target": f"sm_{target}",
        "dtype": _dtypes(launch), "blocks": dict(config.blocks),
        "warps": config.warps, "stages": config.stages, "default": default,
    }  # fmt: skip
    options = {"num_warps": config.warps, "num_stages": config.stages}
    try:
        compiled = triton.compile(
            ASTSource(launch.kernel, *_signature(launch, config)),
            target=GPUTarget("cuda", target, 32),
            options=options,
        )
        registers, local_bytes = _read_cubin(compiled.asm["cubin"])
    except Exception as error:  # noqa: BLE001 - a kernel that doesn't compile is a row of the report
        return KernelResources(**row, status="failed", reason=f"{type(error).__name__}: {error}"[:300])
    shared = int(compiled.metadata.shared)
    status = "ok"
    if local_bytes:
        status = "spills"
    elif shared > min(config.shared_kib, SHARED_LIMIT_KIB[target]) * 1024:
        status = "too much shared memory"
    return KernelResources(
        **row, status=status, registers=registers, local_bytes=local_bytes, shared_bytes=shared
    )


def _dtypes(launch: Launch) -> str:
    """Of the tokens, and of what they meet or become where that is another one: 8-bit forms have two."""
    names = ("hidden", "video", "query", "value", "query_out", "out")
    tensors = [launch.arguments[name] for name in names if name in launch.arguments]
    return " and ".join(dict.fromkeys(str(tensor.dtype).removeprefix("torch.") for tensor in tensors))


def _read_cubin(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory of a thread; a cubin of ours holds one kernel."""
    import triton

    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        command = [tool, "--dump-resource-usage", str(file)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout  # noqa: S603 - Triton's tool
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text)
    if found is None:
        raise BackendError(f"cuobjdump names no registers in {text!r}; its format has changed")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local
