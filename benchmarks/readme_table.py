"""Print the README's table of a bench document: what stands between `<!-- NAME -->` and `<!-- /NAME -->`.

    python -m proteus_deploy.benchmarks.readme_table benchmarks/results/bench_mini.json

NAME is the file's, without its ending. A test holds the README to the file. A file measured on a tree with
changes, or outside a clone, is refused: nobody could measure it again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from proteus_deploy.benchmarks import bench_report
from proteus_deploy.benchmarks.machine import is_clean


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table of one file, between its markers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path, help="what `proteus-deploy bench --json` wrote")
    file: Path = parser.parse_args(arguments).file
    document = json.loads(file.read_text(encoding="utf-8"))
    commit = document["commit"]
    if not is_clean(commit):
        way_out = (
            "measure in a clone" if commit == "unknown" else "commit what `git status` lists, measure again"
        )
        print(f"error: {file} was measured at {commit}, not at a commit: {way_out}", file=sys.stderr)
        return 2
    print(f"<!-- {file.stem} -->\n{bench_report.readme_table(document)}\n<!-- /{file.stem} -->")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
