"""What compiled code needs of a CPU: enough that it never meets an instruction it lacks, and no more."""

from __future__ import annotations

import platform

import pytest
import torch

from proteus_deploy.runtime.cpu_instructions import instruction_set, missing_instructions


class Isa:
    """As inductor's: a name, and extras that its compiler and this CPU know."""

    def __init__(self, name: str, *, bf16: bool = False) -> None:
        self._name, self._bf16 = name, bf16

    def __str__(self) -> str:
        return self._name

    def is_avx512_bf16_supported(self) -> bool:
        return self._bf16


def test_levels_of_x86() -> None:
    avx2 = instruction_set(Isa("avx2"), {})
    assert (avx2.march, "fma3" in avx2.needs) == ("x86-64-v3", True)
    assert not [name for name in avx2.needs if name.startswith(("avx512", "amx"))]
    plain = instruction_set(Isa("avx512 avx512_vnni"), {})
    assert plain.march == "x86-64-v4"
    assert set(avx2.needs) | {"avx512_f", "avx512_bw", "avx512_vnni"} <= set(plain.needs)
    assert "avx512_bf16" not in plain.needs
    assert "avx512_bf16" in instruction_set(Isa("avx512 avx512_vnni", bf16=True), {}).needs
    amx = instruction_set(Isa("avx512 avx512_vnni amx_tile"), {})
    assert {"amx_tile", "amx_bf16", "amx_int8"} <= set(amx.needs)


@pytest.mark.parametrize("name", ["asimd", "INVALID_VEC_ISA", ""])
def test_code_without_a_level_needs_the_whole_cpu(name: str) -> None:
    found = instruction_set(Isa(name), {"neon": True, "sve": False, "sve_max_length": 256, "bf16": True})
    assert (found.march, found.needs) == (None, ("bf16", "neon"))


def test_missing_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_f": False})
    assert missing_instructions(["avx2"], platform.machine()) == []
    assert missing_instructions(["avx2", "avx512_f", "amx_tile"], platform.machine()) == [
        "avx512_f",
        "amx_tile",
    ]
    assert missing_instructions([], "riscv128") == ["riscv128"]
