"""How many layers of the published denoiser can become an engine here, and what would the whole take?

    python -m proteus_deploy.benchmarks.real_size_engines --work-dir DIR --output FILE \\
        --quantize int8 --layers 3 --layers 6 --layers 12

Each slice has the published width and made-up weights. It is exported, then built in a process of its own
that is ended before the machine runs out of memory. From two slices on, a straight line through the peaks
says what all 42 layers would take. ONNX files that --work-dir has from before are not written again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from proteus_deploy._files import check_writable, write_json
from proteus_deploy.benchmarks.limited_process import Limits, run_limited
from proteus_deploy.benchmarks.machine import describe_commit, describe_machine, describe_versions
from proteus_deploy.benchmarks.real_size_denoiser import build_command, export_command
from proteus_deploy.benchmarks.real_size_export import TRANSFORMER, earlier_rows, put_row, write_configs

__all__ = ["extrapolate", "main", "measure_engine"]

_PEAKS = ("peak_memory_bytes", "peak_anonymous_bytes")


def measure_engine(
    work: Path, recipe: str, layers: int, target: str, dtype: str, limits: Limits, *, keep: bool
) -> dict[str, Any]:
    """Export a slice unless it is there, build it; the row of the result file.

    peak_memory_bytes: resident memory of the building process, mapped weight file included.
    peak_anonymous_bytes: without mapped files. reason: where there is no engine, why not.
    """
    configs = write_configs(work / f"configs-{layers}", layers)
    folder = work / f"denoiser-{Path(recipe).stem}-{layers}"
    onnx_file = folder / "denoiser.onnx"
    row: dict[str, Any] = {
        "case": "engine",
        "recipe": recipe,
        "dtype": dtype,
        "layers": layers,
        "target": target,
    }
    if not onnx_file.is_file():
        exported = run_limited(export_command(configs, onnx_file, recipe, dtype), limits)
        if exported.result is None:
            return {**row, "status": "failed", "reason": f"export: {exported.reason}"}
    row["onnx_bytes"] = sum(file.stat().st_size for file in folder.glob("denoiser.onnx*"))
    outcome = run_limited(build_command(configs, onnx_file, target, dtype), limits)
    for file in folder.glob("*.engine") if keep else (folder,):
        shutil.rmtree(file) if file.is_dir() else file.unlink()
    peaks = {
        "peak_memory_bytes": outcome.peak_resident_bytes,
        "peak_anonymous_bytes": outcome.peak_anonymous_bytes,
    }
    if outcome.result is None:
        return {**row, "status": "failed", "reason": outcome.reason, "seconds": outcome.seconds, **peaks}
    # The process knows its own peak, the watcher only what it saw; it alone knows the rest.
    return {**row, **peaks, **outcome.result}


def extrapolate(rows: Sequence[Mapping[str, Any]], layers: int) -> dict[str, Any]:
    """{recipe: {peak: {fixed_bytes, bytes_per_layer, slices, bytes}}}: least squares over the slices built.

    bytes: of `layers` layers. Recipes with fewer than two slices are left out, since no line goes through
    one point, and so is the row of the whole, which is what a line is compared with.
    """
    found: dict[str, Any] = {}
    for recipe in dict.fromkeys(row["recipe"] for row in rows):
        for peak in _PEAKS:
            points = [
                (row["layers"], row[peak])
                for row in rows
                if row["recipe"] == recipe and row["status"] != "failed" and row["layers"] != layers
            ]
            points = [point for point in points if point[1] is not None]
            if len({count for count, _ in points}) > 1:
                found.setdefault(recipe, {})[peak] = _line(points, layers)
    return found


def _line(points: Sequence[tuple[int, int]], layers: int) -> dict[str, Any]:
    counts, peaks = zip(*points, strict=True)
    middle, mean = sum(counts) / len(points), sum(peaks) / len(points)
    slope = sum((count - middle) * (peak - mean) for count, peak in points)
    slope /= sum((count - middle) ** 2 for count in counts)
    fixed = mean - slope * middle
    return {
        "fixed_bytes": round(fixed),
        "bytes_per_layer": round(slope),
        "slices": sorted(counts),
        "bytes": round(fixed + slope * layers),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Write the result file, a row at a time. Returns 0; 1 where a slice has no engine. Raises InputError."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    whole = TRANSFORMER["num_layers"]
    parser.add_argument("--work-dir", type=Path, required=True, help="ONNX files and engines")
    parser.add_argument("--output", type=Path, required=True, help="result file, JSON; rows are added to it")
    parser.add_argument("--quantize", required=True, metavar="RECIPE")
    parser.add_argument(
        "--layers", action="append", type=int, required=True, help=f"3 to {whole}; repeatable"
    )
    parser.add_argument("--target", default="sm89", help="(default: %(default)s)")
    parser.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), default="bf16", help="(default: bf16)")
    parser.add_argument(
        "--memory-limit-gib", type=float, default=16.0, help="of a build (default: %(default)s)"
    )
    parser.add_argument("--timeout-s", type=float, default=1800.0, help="of a build (default: %(default)s)")
    parser.add_argument("--keep", action="store_true", help="keep the ONNX files")
    given = parser.parse_args(argv)
    if any(not 3 <= layers <= whole for layers in given.layers):
        parser.error(
            f"--layers is {given.layers}; a slice has a first, a middle and a last layer: 3 to {whole}"
        )
    check_writable(given.output)
    limits = Limits(round(given.memory_limit_gib * 2**30), timeout_s=given.timeout_s)
    commit = describe_commit(Path(__file__).resolve().parent.parent)
    rows = earlier_rows(given.output, commit)
    failed = False
    for layers in given.layers:
        row = measure_engine(
            given.work_dir, given.quantize, layers, given.target, given.dtype, limits, keep=given.keep
        )
        rows[:] = earlier_rows(given.output, commit)  # another process may have added some meanwhile
        put_row(rows, row)
        failed = failed or row["status"] == "failed"
        document = {
            "what": "engines of slices of the published denoiser, and the memory that building takes",
            "machine": describe_machine(),
            "versions": describe_versions(),
            "commit": commit,
            "settings": {
                "weights": "random, made while read; so are statistics of activations",
                "width": TRANSFORMER["num_attention_heads"] * TRANSFORMER["attention_head_dim"],
                "whole_layers": whole,
                "memory_limit_bytes": limits.anonymous_bytes,
                "left_to_others_bytes": limits.left_bytes,
                "timeout_s": limits.timeout_s,
            },
            "rows": rows,
            "extrapolation": extrapolate(rows, whole),
        }
        write_json(given.output, document)
        print(json.dumps(row), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
