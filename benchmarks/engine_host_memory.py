"""How much host memory a TensorRT build takes, beside the rule that predicts it.

    python -m proteus_deploy.benchmarks.engine_host_memory --json FILE
    python -m proteus_deploy.benchmarks.engine_host_memory --table FILE

Chains of products, which have weights or nodes and little else, and the denoiser of the `mini` size. Each is
built with TensorRT for RTX in a process of its own, once with the plan streamed to its file and once with the
whole plan in memory, as packages without streams do it. No engine is run.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proteus_deploy._files import check_writable, write_json
from proteus_deploy.benchmarks.limited_process import Limits, run_limited
from proteus_deploy.benchmarks.machine import describe_commit, describe_machine, describe_versions
from proteus_deploy.export import host_memory
from proteus_deploy.export.engine_source import EngineSource
from proteus_deploy.runtime.tensorrt_api import EngineOptions, TensorRT

__all__ = ["Products", "main", "measure", "memory_table", "write_products"]

CASES = ("2x64", "1200x64", "32x2048", "16x4096", "8x8192", "mini")  # products x width, or the name of a size
WAYS = ("streamed", "in memory")
TARGET = "sm89"
_DTYPE = "fp16"
_LIMITS = Limits(anonymous_bytes=8 << 30, timeout_s=1200.0)
_MODULE = "proteus_deploy.benchmarks.engine_host_memory"
_ROOT = Path(__file__).resolve().parents[1]
_MIB = 1 << 20
_HEADERS = (
    *("graph", "weights, MiB", "nodes", "peak, MiB, streamed", "predicted"),
    *("peak, MiB, plan in memory", "predicted"),
)


@dataclass(frozen=True)
class Products:
    """`count` products, one after another, with square matrices of `width` rows."""

    count: int
    width: int

    @classmethod
    def parse(cls, case: str) -> Products:
        """From COUNTxWIDTH. Raises ValueError for anything else."""
        count, width = map(int, case.split("x"))
        return cls(count, width)


class _PlanInMemory(TensorRT):
    """As a package without streams: the finished plan comes back whole."""

    def __init__(self, installed: TensorRT) -> None:
        super().__init__(installed.flavour, installed.module)
        self.log = installed.log

    def can_stream(self, builder: Any) -> bool:  # noqa: ARG002
        return False


def write_products(products: Products, onnx_file: Path) -> None:
    """An ONNX file of float16 products of an input (1, width), with random weights in a file beside it."""
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(0)
    shape, weights, nodes = [1, products.width], [], []
    for k in range(products.count):
        matrix = random.standard_normal((products.width, products.width), dtype=np.float32)
        matrix /= products.width**0.5
        weights.append(numpy_helper.from_array(matrix.astype(np.float16), f"weight{k}"))
        nodes.append(helper.make_node("MatMul", [f"x{k}", f"weight{k}"], [f"x{k + 1}"], name=f"product{k}"))
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT16, shape)
        for name in ("x0", f"x{products.count}")
    ]
    graph = helper.make_graph(nodes, "products", ends[:1], ends[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    data = f"{onnx_file.name}.data"
    onnx.save_model(model, onnx_file, save_as_external_data=True, location=data, size_threshold=0)


def measure(case: str, way: str, work: Path) -> dict[str, Any]:
    """Build one engine in this process: {weight_bytes, nodes, peak_bytes, predicted_bytes, engine_bytes}.

    peak_bytes: growth of the process's resident memory from before the graph is parsed, mapped weights
    included; None where /proc doesn't say. Raises InputError, BundleError or BackendError.
    """
    installed = TensorRT.load("tensorrt_rtx")
    api = installed if way == WAYS[0] else _PlanInMemory(installed)
    work.mkdir(parents=True, exist_ok=True)
    onnx_file, engine = work / "graph.onnx", work / f"{TARGET}.engine"
    build = _build_denoiser if case == "mini" else _build_products
    peak = build(case, api, onnx_file, engine)
    source = EngineSource.read(onnx_file)
    return {
        "weight_bytes": source.weight_bytes,
        "nodes": source.nodes,
        "peak_bytes": peak,
        "predicted_bytes": host_memory.predict_bytes(
            source.weight_bytes, source.nodes, streamed=way == WAYS[0]
        ),
        "engine_bytes": engine.stat().st_size,
    }


def _build_products(case: str, api: TensorRT, onnx_file: Path, engine: Path) -> int | None:
    write_products(Products.parse(case), onnx_file)
    builder, network = api.new_network()
    with host_memory.PeakMemory() as memory:
        parser = api.parse(network, onnx_file)
        config = api.new_config(builder, TARGET, EngineOptions())
        api.write_engine(builder, network, config, engine)
        del parser, network, config, builder  # in this order: each uses the next
    return memory.peak_bytes


def _build_denoiser(size: str, api: TensorRT, onnx_file: Path, engine: Path) -> int | None:
    import torch

    from proteus_deploy.benchmarks.sizes import open_size
    from proteus_deploy.export.onnx_graph import export_graph
    from proteus_deploy.export.tensorrt_engine import build_engine
    from proteus_deploy.network_factory import NetworkFactory
    from proteus_deploy.stage_table import build_stage_table

    checkpoint = open_size(size, onnx_file.parent / "configs")
    table = build_stage_table(checkpoint)
    graph = table.graph("denoiser")
    export_graph(
        graph, table, NetworkFactory(checkpoint, folded=True)(graph.name), onnx_file, dtype=torch.float16
    )
    record = build_engine(
        onnx_file, graph, table, TARGET, api=api, destination=engine, dtype=_DTYPE, force_memory=True
    )
    peak: int | None = record["memory"]["peak_bytes"]
    return peak


def _row(case: str, work: Path) -> dict[str, Any]:
    """One graph, built both ways, each in a process of its own."""
    row: dict[str, Any] = {"case": case, "graph": _words(case)}
    for way in WAYS:
        command = [sys.executable, "-m", _MODULE, "--build", case, way, "--work-dir", str(work / way)]
        outcome = run_limited(command, _LIMITS)
        row[way] = outcome.result or {"status": "failed", "reason": outcome.reason}
        print(
            f"{row['graph']}, plan {way}: {outcome.reason or 'built, not run'}", file=sys.stderr, flush=True
        )
    return row


def _words(case: str) -> str:
    if case == "mini":
        return "denoiser of `mini`"
    products = Products.parse(case)
    return f"{products.count} products of {products.width} × {products.width}"


def memory_table(document: Mapping[str, Any]) -> str:
    """Markdown: a row for each graph, then what it was measured with."""
    lines = [f"| {' | '.join(_HEADERS)} |", "|---" * len(_HEADERS) + "|"]
    for row in document["rows"]:
        streamed, whole = (row[way] for way in WAYS)
        built = next((found for found in (streamed, whole) if "nodes" in found), None)
        size = ["", ""] if built is None else [f"{built['weight_bytes'] / _MIB:.1f}", str(built["nodes"])]
        lines.append(f"| {' | '.join([row['graph'], *size, *_peaks(streamed), *_peaks(whole)])} |")
    machine, settings = document["machine"], document["settings"]
    conditions = (
        f"{settings['dtype']}, for {settings['target']}, built, not run; {machine['cpu']}, "
        f"{machine['cores']} cores; tensorrt_rtx {document['versions']['tensorrt_rtx']}; commit "
        f"{document['commit'][:12]}."
    )
    return "\n".join([*lines, "", conditions])


def _peaks(found: Mapping[str, Any]) -> list[str]:
    if "reason" in found:
        return [f"failed: {' '.join(found['reason'].split()).replace('|', '/')}", ""]
    peak = found["peak_bytes"]
    return ["" if peak is None else f"{peak / _MIB:.0f}", f"{found['predicted_bytes'] / _MIB:.0f}"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the result file, or print its table. Returns 1 where an engine wasn't built."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--json", type=Path, metavar="FILE", help="measure, and write this")
    task.add_argument("--table", type=Path, metavar="FILE", help="print the table of a result file")
    task.add_argument("--build", nargs=2, metavar=("CASE", "WAY"), help=argparse.SUPPRESS)
    parser.add_argument("--case", action="append", choices=CASES, help="repeatable (default: all)")
    parser.add_argument("--work-dir", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.table:
        print(memory_table(json.loads(given.table.read_text(encoding="utf-8"))))
        return 0
    if given.build:
        case, way = given.build
        print(json.dumps(measure(case, way, given.work_dir)))
        return 0
    check_writable(given.json)
    commit = describe_commit(_ROOT)  # before the first write, which may change the tree
    rows = []
    for case in given.case or CASES:
        with tempfile.TemporaryDirectory(prefix="proteus-engine-") as work:
            rows.append(_row(case, Path(work)))
        write_json(
            given.json,
            {
                "what": "host memory that TensorRT builds take, beside what is predicted",
                "settings": {
                    "target": TARGET,
                    "dtype": _DTYPE,
                    "flavour": "tensorrt_rtx",
                    "weights": "random",
                    "peak": "growth of resident memory during one build, mapped weights included",
                },
                "machine": describe_machine(),
                "versions": describe_versions(),
                "commit": commit,
                "rows": rows,
            },
        )
    return 1 if any("reason" in row[way] for row in rows for way in WAYS) else 0


if __name__ == "__main__":
    sys.exit(main())
