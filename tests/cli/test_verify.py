"""`proteus-deploy verify`: table, exit codes, documents."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from proteus_deploy.bundle import Bundle
from proteus_deploy.cli.main import main
from proteus_deploy.export import verify

pytest.importorskip("onnxruntime")


def test_good_bundle(parity_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--json", str(tmp_path / "new/report.json"), "--markdown", str(tmp_path / "report.md")]
    assert main(["verify", str(parity_bundle), *files]) == 0
    output = capsys.readouterr()
    lines = output.out.splitlines()
    assert lines[0].split() == ["backend", "check", "error", "tolerance", "kind", "status", "detail"]
    assert lines[-1] == "passed"
    assert (
        sum(line.split()[0] == "onnxruntime" for line in lines)
        == len(Bundle.open(parity_bundle).table.graphs) + 2
    )
    assert "verify onnxruntime: done" in output.err
    document = json.loads((tmp_path / "new/report.json").read_text())
    assert document["passed"]
    assert (tmp_path / "report.md").read_text().startswith(f"# Verification of {parity_bundle.name} (fp32)")


def test_past_a_tolerance(parity_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 1, the graph is named, and the documents are written all the same."""
    (tmp_path / "budget.json").write_text('{"identity_schedule": 1e-12}')
    words = ["--budget", str(tmp_path / "budget.json"), "--json", str(tmp_path / "report.json")]
    assert main(["verify", str(parity_bundle), *words]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines if " failed " in line] == ["identity_schedule"]
    assert lines[-1].startswith("FAILED")
    document = json.loads((tmp_path / "report.json").read_text())
    assert not document["passed"]


def test_not_a_number_is_null_in_json(
    parity_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = verify.Row("onnxruntime", "denoiser", math.nan, 1e-4, "failed", "relative")
    report = verify.VerificationReport("bundle", "fp32", (row,), {}, {})

    def give(*_: Any, **__: Any) -> verify.VerificationReport:
        return report

    monkeypatch.setattr(verify, "verify_bundle", give)
    assert main(["verify", str(parity_bundle), "--json", str(tmp_path / "report.json")]) == 1
    assert " nan " in capsys.readouterr().out
    document = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert document["rows"][0]["error"] is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--backend", "torch"],
            "backend 'torch' is unknown; a bundle runs with onnxruntime, openvino, tensorrt",
        ),
        (["--backend", "eager"], "pass it with --checkpoint"),
        (["--budget", "absent.json"], "budget absent.json is not readable JSON"),
        (["--checkpoint", "absent"], "absent is not a folder"),
        (["--frozen"], "frozen is for the backend compiled"),
        (
            ["--attention", "cpu-bf16"],
            "attention is 'cpu-bf16', which the backends eager and compiled listen to",
        ),
    ],
)
def test_wrong_input(
    parity_bundle: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["verify", str(parity_bundle), *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_folder_that_is_no_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tmp_path)]) == 2
    assert "has no manifest.json" in capsys.readouterr().err


def _quality(tmp_path: Path, *bounds: str) -> list[str]:
    (tmp_path / "quality.toml").write_text("\n".join(f"[[bound]]\n{bound}" for bound in bounds))
    return ["--budget", str(tmp_path / "quality.toml")]


def test_quality_budget(parity_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The backend's video is measured against the reference's; one bound holds, the other can't."""
    words = ["--json", str(tmp_path / "report.json"), "--markdown", str(tmp_path / "report.md")]
    good = _quality(tmp_path, 'metric = "psnr"\nmin = 40')
    assert main(["verify", str(parity_bundle), *good, *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "quality, onnxruntime:" in lines
    assert lines[-1] == "passed"
    # 100 stands for equal frames and nothing is above it; the reference against itself is equal.
    bad = _quality(tmp_path, 'metric = "psnr"\nmin = 40', 'metric = "psnr"\nmin = 101')
    assert main(["verify", str(parity_bundle), *bad, *words]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    document = json.loads((tmp_path / "report.json").read_text())
    assert document["passed"]
    rows = document["quality"]["onnxruntime"]["rows"]
    assert last == f"FAILED: psnr mean ≥ 101: {rows[1]['value']:.4g} is below 101"
    assert [row["passed"] for row in rows] == [True, False]
    text = (tmp_path / "report.md").read_text()
    assert "## Quality, onnxruntime" in text
    assert text.rstrip().endswith("FAILED.")


def test_both_kinds_of_budget(
    parity_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Good quality doesn't save a graph that is past its tolerance."""
    (tmp_path / "budget.json").write_text('{"identity_schedule": 1e-12}')
    words = ["--budget", str(tmp_path / "budget.json"), *_quality(tmp_path, 'metric = "psnr"\nmin = 40')]
    assert main(["verify", str(parity_bundle), *words]) == 1
    output = capsys.readouterr().out
    assert "FAILED: figures" in output
    assert output.splitlines()[-1] == "passed"


def test_video_that_was_never_made_fails_the_quality_budget(
    parity_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def without_video(*_: Any, **__: Any) -> verify.VerificationReport:
        row = verify.Row("onnxruntime", "denoiser", 0.0, 1e-4, "ok", "relative")
        return verify.VerificationReport("bundle", "fp32", (row,), {}, {})

    monkeypatch.setattr(verify, "verify_bundle", without_video)
    words = _quality(tmp_path, 'metric = "psnr"\nmax_drop = 1')
    assert main(["verify", str(parity_bundle), *words]) == 1
    assert "no video was measured" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("bound", "message"),
    [
        ('metric = "face_sim_arc"\nmin = 0.5', "face_sim_arc needs a photo, and a bundle's recorded request"),
        ('metric = "motion_person"\nmin = 0.5', "motion_person needs a person mask"),
        ('metric = "lpips"\nmax = 0.5', "lpips is measured by networks: pass --encoders DIR"),
        ('metric = "pnsr"\nmin = 0.5', "'pnsr' is no metric"),
    ],
)
def test_quality_budget_that_cannot_be_checked(
    parity_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], bound: str, message: str
) -> None:
    assert main(["verify", str(parity_bundle), *_quality(tmp_path, bound)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--budget", "a.toml", "--budget", "b.toml"],
            "two files of quality bounds (TOML), a.toml and b.toml",
        ),
        (["--budget", "a.json", "--budget", "b.json"], "two files of tolerances (JSON)"),
        (["--encoders", "x"], "only a TOML --budget asks for"),
    ],
)
def test_budgets_that_contradict(
    parity_bundle: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["verify", str(parity_bundle), *words]) == 2
    assert message in capsys.readouterr().err
