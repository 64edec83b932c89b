"""`proteus-deploy verify`: is a bundle still the model it came from?"""

from __future__ import annotations

import argparse
from pathlib import Path

NAME = "verify"
HELP = "compare each graph and the whole video with the PyTorch reference; exit code 1 past a tolerance"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder that `export` wrote")
    parser.add_argument(
        "--backend",
        action="append",
        metavar="NAME",
        help="onnxruntime (default), openvino, tensorrt; with --checkpoint eager, compiled; repeatable",
    )
    parser.add_argument(
        "--checkpoint", type=Path, metavar="DIR", help="compute the reference from this checkpoint now"
    )
    parser.add_argument(
        "--budget", type=Path, metavar="FILE", help="JSON of bounds that replace the built-in tolerances"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the report as JSON")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the report as Markdown")


def run(arguments: argparse.Namespace) -> int:
    from proteus_deploy._files import atomic_file, check_writable, write_json
    from proteus_deploy.cli.output import print_table
    from proteus_deploy.cli.paths import open_bundle
    from proteus_deploy.cli.progress import PhaseProgress
    from proteus_deploy.export.verify import verify_bundle

    for file in (arguments.json, arguments.markdown):
        if file is not None:
            check_writable(file)
    bundle = open_bundle(arguments.bundle)
    with PhaseProgress() as progress:
        report = verify_bundle(
            bundle,
            list(dict.fromkeys(arguments.backend or ["onnxruntime"])),
            checkpoint=arguments.checkpoint,
            budget=arguments.budget,
            report=progress,
        )
    print_table(report.headers, report.table())
    print("passed" if report.passed else "FAILED: figures above are outside their tolerance")
    if arguments.json is not None:
        write_json(arguments.json, report.to_json())
    if arguments.markdown is not None:
        with atomic_file(arguments.markdown) as temporary:
            temporary.write_text(report.to_markdown(), encoding="utf-8")
    return 0 if report.passed else 1
