"""Predicted beside measured peak memory of every graph of a bundle, on ONNX Runtime and in PyTorch.

    python -m proteus_deploy.benchmarks.memory_plan BUNDLES --json FILE [--size tiny --size mini]

BUNDLES/<size> is the float32 bundle of a size of sizes.py; it is exported when it is missing. Each graph runs
once, at the sizes of its checkpoint's own video, in a process of its own.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from proteus_deploy._files import check_writable, write_json
from proteus_deploy.benchmarks.machine import describe_commit, describe_machine, describe_versions
from proteus_deploy.benchmarks.sizes import open_size
from proteus_deploy.benchmarks.stage_memory import BACKENDS, measure_graph
from proteus_deploy.bundle import Bundle
from proteus_deploy.memory_plan import RUNTIMES, RequestSize, combine, predict_graph, request_symbols

__all__ = ["measure_bundle", "summary"]

# Below it the process's own buffers and the allocator's pages are what is measured.
SMALL_BYTES = 32 << 20


def measure_bundle(size: str, bundle: Bundle, work: Path) -> list[dict[str, Any]]:
    """A row for each graph and backend: predicted and measured bytes, and their ratio."""
    symbols = request_symbols(bundle.table, bundle.transformer.backbone, RequestSize())
    rows = []
    for graph in bundle.table.graphs:
        sizes = {symbol: symbols[symbol] for symbol in graph.symbols}
        for backend in BACKENDS:
            memory = predict_graph(bundle, graph, symbols, RUNTIMES[backend].fusion)
            stage = combine(graph.stage, {graph.name: memory}, RUNTIMES[backend])
            measured = measure_graph(
                graph.name, backend, bundle=bundle.folder, size=size, work=work, symbols=sizes
            )
            row: dict[str, Any] = {"size": size, "graph": graph.name, "backend": backend, "symbols": sizes}
            row |= {"weight_bytes": memory.weight_bytes, "live_activation_bytes": memory.activations}
            row |= {"predicted_bytes": stage.peak, "measured": measured, "status": "ok"}
            if "reason" in measured:
                row |= {"status": "failed", "measured_bytes": None, "ratio": None}
            else:
                peak = max(measured["loading_bytes"], measured["running_bytes"])
                row |= {"measured_bytes": peak, "ratio": stage.peak / peak if peak else None}
            rows.append(row)
            print(f"{size} {graph.name} {backend}: {row['status']}", file=sys.stderr, flush=True)
    return rows


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """{size: {backend: {n, lowest, median, highest}}} of predicted over measured, above SMALL_BYTES."""
    found: dict[str, Any] = {}
    for row in rows:
        if row["status"] == "ok" and row["measured_bytes"] >= SMALL_BYTES:
            found.setdefault(row["size"], {}).setdefault(row["backend"], []).append(row["ratio"])
    return {
        size: {
            backend: {
                "n": len(ratios),
                "lowest": min(ratios),
                "median": median(ratios),
                "highest": max(ratios),
            }
            for backend, ratios in backends.items()
        }
        for size, backends in found.items()
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundles", type=Path, help="folder with a bundle for each size")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    parser.add_argument("--size", action="append", choices=("tiny", "mini"), help="default: both")
    given = parser.parse_args(arguments)
    check_writable(given.json)
    work = given.bundles / "checkpoints"
    rows: list[dict[str, Any]] = []
    for size in given.size or ("tiny", "mini"):
        folder = given.bundles / size
        if not folder.is_dir():
            from proteus_deploy.export.export import export_bundle

            export_bundle(open_size(size, work), folder, reference="none")
        rows += measure_bundle(size, Bundle.open(folder), work)
        _write(given.json, rows)  # what is there stays when the next size is stopped
    print(f"wrote {given.json}")
    return 0 if all(row["status"] == "ok" for row in rows) else 1


def _write(file: Path, rows: list[dict[str, Any]]) -> None:
    document = {
        "machine": describe_machine(),
        "versions": describe_versions(),
        "commit": describe_commit(Path(__file__).resolve().parents[1]),
        "settings": {"threads": 1, "dtype": "fp32", "small_bytes": SMALL_BYTES},
        "assumptions": {backend: RUNTIMES[backend].text for backend in BACKENDS},
        "summary": summary(rows),
        "rows": rows,
    }
    write_json(file, document)


if __name__ == "__main__":
    raise SystemExit(main())
