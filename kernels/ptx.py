"""A Triton kernel as PTX that someone else launches: name, text, parameters, threads and shared memory.

Triton's own launcher passes two pointers (global and profiling scratch) after the arguments of the signature.
Whoever launches the PTX by its signature doesn't know them, so they are taken off the parameter list, which
is allowed where the body never reads them. Line tables go too: they name files of the machine that compiled.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from proteus_deploy.errors import BackendError
from proteus_deploy.kernels.launch import LaunchConfig, load_kernels

_ENTRY = re.compile(r"\.visible \.entry (?P<name>[\w$]+)\((?P<parameters>[^)]*)\)")
_PARAMETER = re.compile(r"\.param \.(?P<type>\w+)(?: \.ptr [^,]*?)? (?P<name>[\w$]+)\s*$")
_THREADS = re.compile(r"\.reqntid (\d+)")
_LINES = re.compile(r"^\s*\.(?:loc|file)\s.*\n", re.MULTILINE)
_DEBUG = re.compile(r"^\s*\.section\s+\.debug\w*\s*\{[^}]*\}[ \t]*\n?", re.MULTILINE)
# The first with every target of ours (sm_120 came with it). A driver reads its own version and older ones, so
# Triton's default, that of its newest assembler, would shut out drivers without need.
_PTX_VERSION = 87
_PTX_TYPE = {"i32": "u32", "i64": "u64", "fp32": "f32"}  # pointers are u64


@dataclass(frozen=True)
class Ptx:
    """One compiled kernel. Parameters are pairs of name in the signature and PTX type, in order."""

    kernel: str
    text: str
    parameters: tuple[tuple[str, str], ...]
    threads: int  # of a block
    shared_bytes: int  # dynamic shared memory of a block


def check_compiles() -> None:
    """Raises BackendError where triton is absent or interprets kernels instead of compiling them."""
    parts = load_kernels("proteus_deploy.kernels.triton_parts")
    if parts.INTERPRETED.value:
        raise BackendError("TRITON_INTERPRET=1 interprets kernels; unset it to compile them")


def compile_ptx(
    kernel: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    config: LaunchConfig,
    capability: int,
    *,
    aligned: Collection[str] = (),
) -> Ptx:
    """Compile `kernel` for a compute capability (90 for sm_90) without a GPU.

    types: Triton's type of each argument that is passed ("*bf16", "i32", …), in any order. constants: every
    other argument. aligned: pointers to a multiple of 16 bytes. The configuration's blocks are constants too.
    Raises BackendError where triton is absent or interprets kernels, or the kernel needs more than a plain
    launch: scratch memory, a cluster of blocks.
    """
    check_compiles()
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    given = {**constants, **dict(config.blocks)}
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    places = {name: (place,) for place, name in enumerate(kernel.arg_names)}
    compiled = triton.compile(
        ASTSource(
            kernel,
            signature,
            {places[name]: value for name, value in given.items()},
            {places[name]: [["tt.divisibility", 16]] for name in aligned},
        ),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": config.warps, "num_stages": config.stages, "ptx_version": _PTX_VERSION},
    )
    _check_plain(compiled.metadata)
    passed = [name for name in kernel.arg_names if name in types]
    wanted = ["u64" if types[name].startswith("*") else _PTX_TYPE[types[name]] for name in passed]
    text = _without_debug(_without_scratch(compiled.asm["ptx"], wanted))
    threads = _THREADS.search(text)
    if threads is None:
        raise BackendError(f"the PTX of {kernel.__name__} names no block size; Triton's output has changed")
    return Ptx(
        compiled.metadata.name,
        text,
        tuple(zip(passed, wanted, strict=True)),
        int(threads[1]),
        int(compiled.metadata.shared),
    )


def read_parameters(text: str) -> tuple[str, list[tuple[str, str]]]:
    """Name of the one entry of PTX `text` and its parameters, (name, type) each. Raises BackendError."""
    entries = list(_ENTRY.finditer(text))
    if len(entries) != 1:
        raise BackendError(f"the PTX has {len(entries)} entries, expected one; Triton's output has changed")
    listed = [part.strip() for part in entries[0]["parameters"].split(",") if part.strip()]
    found = [_PARAMETER.match(part) for part in listed]
    if None in found:
        raise BackendError(f"the PTX lists the parameters {listed}, which isn't read here")
    return entries[0]["name"], [(match["name"], match["type"]) for match in found if match is not None]


def _check_plain(metadata: Any) -> None:
    needs = {
        "global scratch memory": metadata.global_scratch_size,
        "profiling scratch memory": metadata.profile_scratch_size,
        "a cluster of blocks": metadata.num_ctas > 1,
        "a cooperative launch": metadata.launch_cooperative_grid,
    }
    if found := [what for what, needed in needs.items() if needed]:
        raise BackendError(f"the kernel {metadata.name} needs {', '.join(found)}, which a plain launch lacks")


def _without_scratch(text: str, wanted: list[str]) -> str:
    """PTX with the parameters of the signature alone; those that Triton adds must be unused."""
    name, parameters = read_parameters(text)
    kept, added = parameters[: len(wanted)], parameters[len(wanted) :]
    if [kind for _, kind in kept] != wanted:
        raise BackendError(f"the PTX of {name} takes {kept}, the signature asks for {wanted}")
    entry = _ENTRY.search(text)
    assert entry is not None
    for parameter, _ in added:
        if len(re.findall(rf"{re.escape(parameter)}\b", text)) != 1:
            raise BackendError(f"the PTX of {name} reads {parameter}, which only Triton's launcher passes")
    lines = entry["parameters"].split(",")[: len(wanted)]
    start, end = entry.span("parameters")
    return f"{text[:start]}{','.join(lines).rstrip()}\n{text[end:]}"


def _without_debug(text: str) -> str:
    return _DEBUG.sub("", _LINES.sub("", text)).replace(", debug\n", "\n")
