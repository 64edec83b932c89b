"""Which instructions of a CPU compiled code needs, and whether a CPU has them.

Names are those of `torch.cpu.get_capabilities`: avx2, avx512_f, amx_tile, …
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

# The levels of the x86-64 psABI, as far as their names can be looked up.
_V3 = ("avx", "avx2", "bmi", "bmi2", "f16c", "fma3", "lzcnt")
_V4 = (*_V3, "avx512_bw", "avx512_cd", "avx512_dq", "avx512_f", "avx512_vl")
_LEVELS = {"avx2": ("x86-64-v3", _V3), "avx512": ("x86-64-v4", _V4)}
# What inductor's vector code uses beyond its level, where its compiler and this CPU know it.
_WORDS = {
    "avx512_vnni": ("avx512_vnni",),
    "amx_tile": ("amx_bf16", "amx_int8", "amx_tile"),
}


@dataclass(frozen=True)
class InstructionSet:
    """name: inductor's own. march: what the compiler gets, None for this very CPU. needs: capabilities."""

    name: str
    march: str | None
    needs: tuple[str, ...]


def instruction_set(isa: Any, capabilities: Mapping[str, Any]) -> InstructionSet:
    """What code compiled for inductor's vector instruction set `isa` needs of a CPU.

    isa: what `torch._inductor.cpu_vec_isa.pick_vec_isa` returns. The compiler is held to a level of the
    architecture, so that a package needs what is listed and nothing else of the CPU that built it. Where
    there is no such level the code is made for this very CPU, and needs all its `capabilities`.
    """
    words = str(isa).split()
    level = _LEVELS.get(words[0]) if words else None
    if level is None:
        return InstructionSet(str(isa), None, _present(capabilities))
    march, needs = level
    found = {*needs, *(name for word in words[1:] for name in _WORDS.get(word, (word,)))}
    for name in ("avx512_bf16", "amx_fp16"):
        supported = getattr(isa, f"is_{name}_supported", None)
        if supported is not None and supported():
            found.add(name)
    return InstructionSet(str(isa), march, tuple(sorted(found)))


def missing_instructions(needs: Iterable[str], machine: str) -> list[str]:
    """Those of `needs` that this CPU lacks; the machine itself when it is of another architecture."""
    import torch

    if machine != platform.machine():
        return [machine]
    capabilities = torch.cpu.get_capabilities()
    return [name for name in needs if not capabilities.get(name, False)]


def _present(capabilities: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(sorted(name for name, value in capabilities.items() if value is True))
