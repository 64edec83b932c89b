"""Registers, spills and shared memory of every Triton kernel on every target, compiled without a GPU.

    python -m proteus_deploy.benchmarks.kernel_resources [--target 90 ...] [--defaults-only] [--output FILE]

Prints the table as Markdown and then one line of JSON; --output writes the rows with machine, versions and
commit. Exits with 1 where a kernel spills, fails to compile or takes more shared memory than it may.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from proteus_deploy._files import write_json
from proteus_deploy.benchmarks.machine import describe_commit, describe_machine, describe_versions
from proteus_deploy.kernels.ahead_of_time import (
    TARGETS,
    as_document,
    kernel_resources,
    markdown_table,
    published_launches,
)

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--target", type=int, action="append", choices=TARGETS, help="90 for sm_90; repeatable"
    )
    parser.add_argument("--dtype", choices=tuple(_DTYPES), default="bf16", help="of tokens and weights")
    parser.add_argument("--defaults-only", action="store_true", help="leave out what only tuning would try")
    parser.add_argument("--output", type=Path, help="result file, JSON")
    arguments = parser.parse_args()
    launches = published_launches(_DTYPES[arguments.dtype])
    targets = tuple(arguments.target or TARGETS)
    rows = []
    for row in kernel_resources(launches, targets, defaults_only=arguments.defaults_only):
        print(f"{row.target} {row.kernel} {row.blocks}: {row.status}", file=sys.stderr, flush=True)
        rows.append(row)
    print(markdown_table(rows))
    bad = [row for row in rows if row.status != "ok"]
    if arguments.output:
        result = {
            "machine": describe_machine(),
            "versions": describe_versions(),
            "commit": describe_commit(Path(__file__).resolve().parent.parent),
            "settings": {"size": "5b", "dtype": arguments.dtype, "ran": "built, not run"},
            "rows": as_document(rows),
        }
        write_json(arguments.output, result)
    print(json.dumps({"kernels": len(rows), "not_ok": as_document(bad)}))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
