"""Every kernel compiles without a GPU, and the committed report says that none of them spills."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from proteus_deploy.errors import BackendError
from proteus_deploy.kernels.ahead_of_time import (
    TARGETS,
    KernelResources,
    kernel_resources,
    markdown_table,
    published_launches,
)
from proteus_deploy.kernels.launch import SHARED_LIMIT_KIB

KERNELS = {
    "decode_attention_kernel",
    "gated_residual_norm_kernel",
    "identity_attention_kernel",
    "identity_attention_hidden_gradient_kernel",
    "identity_attention_score_gradient_kernel",
    "identity_attention_small_gradient_kernel",
    "join_splits_kernel",
    "joint_attention_kernel",
    "modulated_norm_kernel",
    "qk_norm_rotary_kernel",
    "quantise_pair_kernel",
}
NO_FP8 = {80}  # targets without products of e4m3


def test_each_kernel_has_a_space_with_a_point_for_every_target() -> None:
    launches = published_launches()
    assert {launch.kernel.__name__ for launch in launches} == KERNELS
    for launch in launches:
        assert len(set(launch.space)) == len(launch.space) >= 2
        fp8 = any(
            isinstance(value, torch.Tensor) and value.dtype == torch.float8_e4m3fn
            for value in launch.arguments.values()
        )
        for target in TARGETS:
            fits = any(config.fits(target) for config in launch.space)
            assert fits == (not fp8 or target not in NO_FP8), (launch.kernel.__name__, target)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled and not interpreted here")
def test_interpreted_kernels_are_not_compiled() -> None:
    with pytest.raises(BackendError, match="TRITON_INTERPRET=1 interprets kernels; unset it"):
        next(kernel_resources(published_launches()))


def test_the_table_marks_defaults_and_keeps_failures() -> None:
    good = KernelResources("k", "sm_90", "bfloat16", {"ROWS": 2}, 4, 1, True, "ok", 32, 0, 2048)
    bad = KernelResources("k", "sm_80", "bfloat16", {"ROWS": 4}, 4, 1, False, "failed", reason="why")
    lines = markdown_table([good, bad]).splitlines()
    assert lines[2] == "| **k** | sm_90 | bfloat16 | ROWS 2 | 4 | 1 | 32 | 0 | 2.0 | ok |"
    assert lines[3] == "| k | sm_80 | bfloat16 | ROWS 4 | 4 | 1 |  |  |  | why |"


@pytest.mark.slow
def test_no_default_spills_on_sm_90(tmp_path: Path) -> None:
    output = tmp_path / "rows.json"
    # A process of its own: in this one the kernels may be interpreted.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [
            sys.executable, "-m", "proteus_deploy.benchmarks.kernel_resources",
            "--target", "90", "--defaults-only", "--output", str(output),
        ],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(output.read_text(encoding="utf-8"))["rows"]
    assert {row["kernel"] for row in rows} == KERNELS
    assert {row["local_bytes"] for row in rows} == {0}


def test_the_committed_report_covers_every_kernel_and_target_without_a_spill(repository: Path) -> None:
    report: dict[str, Any] = json.loads(
        (repository / "benchmarks" / "results" / "kernel_resources.json").read_text(encoding="utf-8")
    )
    rows = report["rows"]
    defaults = {(row["kernel"], row["target"]) for row in rows if row["default"]}
    assert defaults == {(kernel, f"sm_{target}") for kernel in KERNELS for target in TARGETS}
    attention = {
        (row["dtype"], row["target"])
        for row in rows
        if row["kernel"] == "joint_attention_kernel" and row["default"]
    }
    assert attention == {
        (dtype, f"sm_{target}")
        for dtype in ("bfloat16", "int8 and bfloat16", "float8_e4m3fn and bfloat16")
        for target in TARGETS
        if not dtype.startswith("float8") or target not in NO_FP8
    }
    for row in rows:
        assert (row["status"], row["local_bytes"]) == ("ok", 0), row
        assert row["shared_bytes"] <= SHARED_LIMIT_KIB[int(row["target"].removeprefix("sm_"))] * 1024, row
