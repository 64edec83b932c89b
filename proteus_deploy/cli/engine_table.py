"""The engine report on a terminal: one table, worst first, and a line for each engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from proteus_deploy.cli.output import print_table

if TYPE_CHECKING:
    from proteus_deploy.bundle import EngineSet

_MOST_ROWS = 12


def print_engine_reports(sets: Sequence[EngineSet]) -> None:
    """Print what each engine was asked to compute in, then the reasons why one would not be faster."""
    from proteus_deploy.export.engine_report_page import attention_text, finding_rows, precisions_text

    rows = []
    for engines in sets:
        for name, record in engines.graphs.items():
            report = record.get("report")
            if report is None:
                rows.append((name, engines.target, "", "", "no report: build it again"))
                continue
            rows.append(
                (name, engines.target, precisions_text(report), attention_text(report), report["source"])
            )
    print_table(("graph", "target", "products", "attention", "source"), rows or [("none built", *[None] * 4)])
    findings = finding_rows(sets)
    if not findings:
        return
    print()
    print_table(("graph", "target", "share", "finding", "reason"), findings[:_MOST_ROWS])
    if len(findings) > _MOST_ROWS:
        print(f"{len(findings) - _MOST_ROWS} more: proteus-deploy inspect … --engines --json has them all")
