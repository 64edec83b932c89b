"""Engines of recipes: rows of what was built and refused, and their table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from proteus_deploy.benchmarks import quantised_engines
from proteus_deploy.benchmarks.quantised_engines import HEADERS, engines_table


def _document(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "machine": {"cpu": "Some CPU", "cores": 2},
        "versions": {"tensorrt_rtx": "1.7", "onnx": "1.23"},
        "commit": "0123456789abcdef",
        "settings": {"dtype": "bf16"},
        "rows": rows,
    }


BUILT: dict[str, Any] = {
    "recipe": "int8",
    "target": "sm89",
    "status": "built, not run",
    "seconds": 12.4,
    "peak_memory_bytes": 700 << 20,
    "engine_bytes": 17 << 20,
    "verdicts": {"as asked": 3, "explained": 2, "unexplained": 1, "not asked for": 0},
    "products": [
        {"asked": "int8 x int8", "found": "int8 x int8", "count": 2},
        {"asked": "no Linear layer", "found": "bf16 x bf16", "count": 2},
        {"asked": "int8", "found": "bf16 x int8", "count": 1},
        {"asked": "int8 x int8", "found": "bf16 x bf16", "count": 1},
    ],
    "unexplained": ["a"],
    "codes": {"quantize": 2, "dequantize": 5, "not_folded": 1},
}


def test_table() -> None:
    refused = {"recipe": "nvfp4", "target": "sm89", "status": "refused", "reason": "nvfp4 needs sm100"}
    plain = {name: value for name, value in BUILT.items() if name not in ("verdicts", "products", "codes")}
    lines = engines_table(_document([BUILT, {**plain, "recipe": "none"}, refused])).splitlines()
    assert lines[2:5] == [
        (
            "| `int8` | sm89 | built, not run | 12 | 700 | 17 | 2 int8 x int8, 3 bf16 x bf16, 1 bf16 x int8 "
            "| 3 | 2 | 1 | 1 of 5 |"
        ),
        "| `none` | sm89 | built, not run | 12 | 700 | 17 |  |  |  |  |  |",
        "| `nvfp4` | sm89 | refused |  |  |  |  |  |  |  |  |",
    ]
    assert {line.count("|") for line in lines[:5]} == {len(HEADERS) + 1}
    assert lines[6] == "- `nvfp4` for sm89: refused. nvfp4 needs sm100."
    assert lines[-1].endswith("tensorrt_rtx 1.7, onnx 1.23; commit 0123456789ab.")


@pytest.mark.slow
def test_rows_of_the_parity_checkpoint(
    parity: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A recipe of weights alone, one that the target can't run, and the denoiser as exported."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    file = tmp_path / "rows.json"
    command = ["--work", str(tmp_path / "work"), "--json", str(file), "--target", "sm89"]
    command += ["--checkpoint", str(parity / "checkpoint")]
    for recipe in ("none", "int8-weight", "nvfp4-weight"):
        command += ["--recipe", recipe]
    assert quantised_engines.main(command) == 0
    document = json.loads(file.read_text())
    plain, weights, refused = document["rows"]
    assert document["settings"]["statistics"] is None
    assert (plain["status"], weights["status"]) == ("built, not run", "built, not run")
    assert "verdicts" not in plain
    assert weights["onnx_bytes"] < plain["onnx_bytes"]
    assert weights["unexplained"] == []
    assert weights["verdicts"]["as asked"] > 0
    assert sum(product["count"] for product in weights["products"]) == sum(weights["verdicts"].values())
    assert weights["codes"]["quantize"] == weights["codes"]["not_folded"] == 0
    assert refused["status"] == "refused"
    assert "sm100" in refused["reason"]
    printed = capsys.readouterr().out
    assert printed.strip() == engines_table(document)
    assert quantised_engines.main(["--table", str(file)]) == 0
    assert capsys.readouterr().out == printed


def test_a_failed_build_is_a_row(parity: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from proteus_deploy.benchmarks.limited_process import Outcome

    monkeypatch.setattr(
        quantised_engines, "run_limited", lambda *_: Outcome(None, "killed at 9 GiB", 1.0, None, None)
    )
    from proteus_deploy.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(parity / "checkpoint")
    row = {"recipe": "none", "target": "sm89", **quantised_engines._build(checkpoint, tmp_path, "sm89")}
    assert row == {"recipe": "none", "target": "sm89", "status": "failed", "reason": "killed at 9 GiB"}
    monkeypatch.setattr(quantised_engines, "_measure", lambda _: _document([row]))
    assert quantised_engines.main(["--work", str(tmp_path), "--json", str(tmp_path / "x.json")]) == 1
