"""The benchmark behind the rule for host memory, and its table on the page."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from proteus_deploy.benchmarks.engine_host_memory import (
    CASES,
    WAYS,
    Products,
    main,
    memory_table,
    write_products,
)
from proteus_deploy.benchmarks.machine import is_clean
from proteus_deploy.export import host_memory


def test_the_page_shows_what_was_measured(repository: Path) -> None:
    file = repository / "benchmarks" / "results" / "engine_host_memory.json"
    document = json.loads(file.read_text(encoding="utf-8"))
    text = (repository / "docs" / "build.md").read_text(encoding="utf-8")
    name = file.stem
    assert re.findall(rf"<!-- {name} -->\n(.*?)\n<!-- /{name} -->", text, re.DOTALL) == [
        memory_table(document)
    ]
    assert is_clean(document["commit"]), "measure a commit, not a working tree"
    assert [row["case"] for row in document["rows"]] == list(CASES)


def test_the_rule_covers_every_build(repository: Path) -> None:
    file = repository / "benchmarks" / "results" / "engine_host_memory.json"
    for row in json.loads(file.read_text(encoding="utf-8"))["rows"]:
        for way in WAYS:
            found = row[way]
            predicted = host_memory.predict_bytes(
                found["weight_bytes"], found["nodes"], streamed=way == "streamed"
            )
            assert found["predicted_bytes"] == predicted, "the rule has changed: measure again"
            assert found["peak_bytes"] <= predicted, (row["graph"], way)


def test_a_case_is_built_both_ways(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    file = tmp_path / "found.json"
    assert main(["--json", str(file), "--case", "2x64"]) == 0
    document = json.loads(file.read_text(encoding="utf-8"))
    (row,) = document["rows"]
    assert row["graph"] == "2 products of 64 × 64"
    for way in WAYS:
        assert row[way]["weight_bytes"] > 2 * 64 * 64 * 2, "both matrices in float16, and the graph"
        assert row[way]["nodes"] == 2
        assert row[way]["engine_bytes"] > 0
    capsys.readouterr()
    assert main(["--table", str(file)]) == 0
    assert capsys.readouterr().out.strip() == memory_table(document)


def test_what_could_not_be_built_is_a_row(tmp_path: Path) -> None:
    built = {"weight_bytes": 3 << 20, "nodes": 7, "peak_bytes": 100 << 20, "predicted_bytes": 265 << 20}
    document = {
        "machine": {"cpu": "Some CPU", "cores": 2},
        "versions": {"tensorrt_rtx": "1.7"},
        "commit": "0123456789abcdef",
        "settings": {"dtype": "fp16", "target": "sm89"},
        "rows": [
            {
                "graph": "some graph",
                "streamed": built,
                "in memory": {"status": "failed", "reason": "exit code 1:\nno | memory"},
            }
        ],
    }
    lines = memory_table(document).splitlines()
    assert lines[2] == "| some graph | 3.0 | 7 | 100 | 265 | failed: exit code 1: no / memory |  |"
    assert len({line.count("|") for line in lines[:3]}) == 1
    assert lines[-1] == (
        "fp16, for sm89, built, not run; Some CPU, 2 cores; tensorrt_rtx 1.7; commit 0123456789ab."
    )


def test_products_chain(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    write_products(Products.parse("3x8"), tmp_path / "graph.onnx")
    model = onnx.load(tmp_path / "graph.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node] == ["MatMul"] * 3
    assert (tmp_path / "graph.onnx.data").stat().st_size >= 3 * 8 * 8 * 2
