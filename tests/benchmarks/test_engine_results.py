"""Tables of engines and of the published size are what their result files say."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from proteus_deploy.benchmarks.machine import is_clean
from proteus_deploy.benchmarks.quantised_engines import engines_table
from proteus_deploy.benchmarks.real_size_tables import exports_table, main, slices_table

# Result file -> (page, table), shown between <!-- NAME --> and <!-- /NAME -->.
TABLES: dict[str, tuple[str, Callable[[Mapping[str, Any]], str]]] = {
    "quantised_engines": ("engine-report.md", engines_table),
    "real_size_export_quantised": ("quantize.md", exports_table),
    "real_size_engines": ("build.md", slices_table),
}


@pytest.mark.parametrize("name", TABLES)
def test_pages_show_what_was_measured(repository: Path, name: str) -> None:
    """A file without its table, a table without its file, or figures that differ: all fail."""
    page, table = TABLES[name]
    file = repository / "benchmarks" / "results" / f"{name}.json"
    text = (repository / "docs" / page).read_text(encoding="utf-8")
    shown = re.findall(rf"<!-- {name} -->\n(.*?)\n<!-- /{name} -->", text, re.DOTALL)
    if not file.is_file():
        assert name not in text
        return
    document = json.loads(file.read_text(encoding="utf-8"))
    assert shown == [table(document)]
    assert is_clean(document["commit"]), "measure a commit, not a working tree"
    assert not [row for row in document["rows"] if row.get("unexplained")]


def test_tables_of_the_published_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = {"machine": {"cpu": "Some CPU", "cores": 2}, "commit": "0123456789abcdef"}
    exports = {
        **common,
        "settings": {"width": 3072},
        "rows": [
            {
                "recipe": "int8",
                "status": "ok",
                "file_bytes": 6_400_000_000,
                "peak_memory_bytes": 1_500_000_000,
                "seconds": 301.2,
                "load_average": 2.5,
            },
            {"recipe": "fp8", "status": "failed", "reason": "killed", "seconds": 3.0},
        ],
    }
    lines = exports_table(exports).splitlines()
    assert lines[2:4] == ["| `int8` | 6.40 | 1.50 | 301 |", "| `fp8` |  |  | killed |"]
    assert lines[-1].endswith("2 cores at a load of 2.5 to 2.5; commit 0123456789ab.")
    line = {"fixed_bytes": 500_000_000, "bytes_per_layer": 250_000_000, "slices": [3, 6], "bytes": 11 * 10**9}
    slices = {
        **common,
        "settings": {"width": 3072, "whole_layers": 42},
        "extrapolation": {"int8": {"peak_memory_bytes": line}},
        "rows": [
            {
                "recipe": "int8",
                "layers": 3,
                "target": "sm89",
                "status": "built, not run",
                "onnx_bytes": 640_000_000,
                "peak_memory_bytes": 2_000_000_000,
                "peak_anonymous_bytes": 1_000_000_000,
                "engine_bytes": 650_000_000,
                "seconds": 25.1,
                "unexplained": [],
            },
            {"recipe": "int8", "layers": 42, "target": "sm89", "status": "failed", "reason": "killed"},
        ],
    }
    lines = slices_table(slices).splitlines()
    assert lines[2:4] == [
        "| `int8` | 3 of 42 | sm89 | 0.64 | built, not run | 2.00 | 1.00 | 0.65 | 25 | 0 |",
        "| `int8` | 42 of 42 | sm89 |  | failed: killed |  |  |  |  |  |",
    ]
    assert lines[5] == (
        "`int8`, peak: 0.50 GB + 0.250 GB × layers, a line through 3, 6 layers: 11.00 GB for all 42."
    )
    assert len({row.count("|") for row in lines[:4]}) == 1
    for document in (exports, slices):
        file = tmp_path / "result.json"
        file.write_text(json.dumps(document))
        assert main([str(file)]) == 0
    assert capsys.readouterr().out.strip().endswith(slices_table(slices))
