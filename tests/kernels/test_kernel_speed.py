"""The one command for a GPU, rehearsed with small sizes under the interpreter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from proteus_deploy.benchmarks import gpu_run
from proteus_deploy.benchmarks.kernel_speed import PUBLISHED, SMALL, kernel_cases, measure_kernels

APPROXIMATE = ["joint attention, int8", "joint attention, fp8"]
NAMES = [
    "identity attention", "modulated norm", "QK norm and rotary", "gated residual and norm",
    "joint attention", *APPROXIMATE, "decode attention", "decode attention, one image",
]  # fmt: skip


def test_work_is_that_of_the_kernels_pages() -> None:
    """Bytes and FLOPs at the published size, as the READMEs of the kernels give them."""
    meta = torch.device("meta")
    cases = {case.name: case for case in kernel_cases(PUBLISHED, meta, torch.bfloat16)}
    assert list(cases) == NAMES
    assert cases["identity attention"].flops == 4 * 2 * 17_550 * 3072 * 512
    assert round(cases["gated residual and norm"].bytes / 1e6) == 874
    assert round(cases["modulated norm"].bytes / 1e6) == 437
    assert round(cases["joint attention"].flops / 1e12, 1) == 7.8
    assert round(cases["joint attention"].bytes / 1e6) == 874
    assert round(cases["joint attention, int8"].bytes / 1e6) == 1311
    assert round(cases["decode attention"].bytes / 1e6) == 208
    assert round(cases["decode attention"].flops / 1e9, 2) == 0.31
    assert round(cases["decode attention, one image"].bytes / 1e6, 1) == 6.5


def test_rows_of_the_rehearsal(device: torch.device) -> None:
    rows = measure_kernels(SMALL, device, torch.float32, rounds=2, compiled=False)
    assert [row["kernel"] for row in rows] == NAMES
    for row in rows:
        assert row["status"] == "ok", row
        # Above 1e-3, so that an 8-bit form can't be the exact one under another name.
        least, most = (1e-3, 7e-2) if row["kernel"] in APPROXIMATE else (0, 1e-5)
        assert least <= row["relative_error"] < most
        assert row["milliseconds"]["triton"]["n"] == 2
        assert row["share_of_floor"] > 0
    assert set(rows[0]["speedup"]) == {"eager", "published"}


def test_the_command_writes_its_claims(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_run, "_loop", lambda *_: {"rows": []})
    assert gpu_run.main(["--output-dir", str(tmp_path), "--rehearse"]) == 0
    document = json.loads((tmp_path / "claims.json").read_text())
    assert document["rehearsal"] is True
    verdicts = {claim["claim"]: claim["verdict"] for claim in document["claims"]}
    assert len(verdicts) == 10
    assert verdicts["joint attention, int8, over PyTorch's own"] != "not known"
    assert verdicts["the exact loop over the published form"] == "not known"
    assert len(json.loads((tmp_path / "kernels.json").read_text())["rows"]) == 9
    assert "the exact loop over the published form: not measured" in capsys.readouterr().out


def test_a_part_that_would_begin_too_late_is_left_out(tmp_path: Path) -> None:
    assert gpu_run.main(["--output-dir", str(tmp_path), "--rehearse", "--seconds", "-1"]) == 1
    claims = json.loads((tmp_path / "claims.json").read_text())["claims"]
    assert {claim["verdict"] for claim in claims} == {"not known"}
