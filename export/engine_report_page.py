"""Engine reports as a page and as one document."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from proteus_deploy.bundle import Bundle, EngineSet
from proteus_deploy.export.engine_recipe import HIGHER

_MOST_LAYERS = 20  # of a graph, by FLOPs; the JSON has them all


def report_document(bundle: Bundle, sets: Sequence[EngineSet]) -> dict[str, Any]:
    """{bundle, dtype, targets {target: {version, graphs {graph: report}}}}; JSON-able."""
    return {
        "bundle": str(bundle.folder),
        "dtype": bundle.dtype,
        "targets": {
            engines.target: {
                "version": f"{engines.document['flavour']} {engines.document['version']}",
                "graphs": {name: record.get("report") for name, record in engines.graphs.items()},
            }
            for engines in sets
        },
    }


def finding_rows(sets: Sequence[EngineSet]) -> list[tuple[str, str, str, str, str]]:
    """(graph, target, share of FLOPs, code, sentence) of every finding, the largest share first."""
    rows = [
        (finding["share"], name, engines.target, finding["code"], finding["text"])
        for engines in sets
        for name, record in engines.graphs.items()
        for finding in (record.get("report") or {}).get("findings", ())
    ]
    rows.sort(key=lambda row: (-row[0], *row[1:]))
    return [(name, target, f"{share:.0%}", code, text) for share, name, target, code, text in rows]


def precisions_text(report: Mapping[str, Any]) -> str:
    """ "int8 91%, fp16 9%": shares of the products' FLOPs by the precision asked for."""
    return ", ".join(f"{name} {share:.0%}" for name, share in report["precisions"].items()) or "no products"


def attention_text(report: Mapping[str, Any]) -> str:
    """ "5 can be fused, 3 needn't be fused": attentions by what is known of them."""
    counts: dict[str, int] = {}
    for entry in report["attention"]:
        state = entry["taken"] or entry["state"]
        counts[state] = counts.get(state, 0) + 1
    return ", ".join(f"{count} {state}" for state, count in counts.items()) or "none"


def report_page(bundle: Bundle, sets: Sequence[EngineSet]) -> str:
    """Markdown: findings of all engines, then each engine with its dearest layers."""
    lines = [f"# Engine report: {bundle.folder.name}", ""]
    lines += ["Shares are of an engine's FLOPs; FLOPs and bytes are estimates at the tuned sizes.", ""]
    rows = finding_rows(sets)
    if rows:
        lines += _table(("graph", "target", "share", "finding", "reason"), rows)
    else:
        lines += ["No reason found why an engine would not be as fast as its precision allows."]
    for engines in sets:
        for name, record in engines.graphs.items():
            lines += ["", f"## {name} for {engines.target}", ""]
            lines += _engine(record.get("report"))
    return "\n".join(lines) + "\n"


def _engine(report: Mapping[str, Any] | None) -> Iterator[str]:
    if report is None:
        yield "Built by an earlier release, which wrote no report; build it again."
        return
    reformats = report["reformats"]
    yield f"Source: {report['source']}. Products: {precisions_text(report)}. Attention: "
    yield f"{attention_text(report)}. Reformat layers: {'unknown' if reformats is None else len(reformats)}. "
    yield f"In all {report['flops'] / 1e9:,.2f} GFLOP and {report['bytes'] / 2**20:,.1f} MiB."
    yield ""
    if recipe := report.get("recipe"):
        yield from _recipe(recipe)
        yield ""
    dearest = sorted(report["layers"], key=lambda row: -row["flops"])[:_MOST_LAYERS]
    rows = [
        (
            row["weight"] or row["name"],
            row["operator"].replace("_", " "),
            row["asked"],
            row["taken"] or "not known",
            f"{row['flops'] / 1e6:,.1f}",
            f"{row['bytes'] / 2**20:,.2f}",
        )
        for row in dearest
    ]
    yield from _table(("layer", "operator", "asked", "taken", "MFLOP", "MiB"), rows)
    if len(report["layers"]) > len(rows):
        yield ""
        yield f"{len(report['layers']) - len(rows)} more layers are in the JSON report."


def recipe_rows(recipe: Mapping[str, Any]) -> list[tuple[str, str, str, str, str, str]]:
    """(asked by the recipe, found, products, share of FLOPs, verdict, reason), the largest share first.

    Products that differ in their names alone share a row.
    """
    groups: dict[tuple[str, str, str, str], list[float]] = {}
    for product in recipe["products"] or ():
        key = product["wanted"] or "no Linear layer", product["found"], product["verdict"], product["reason"]
        groups.setdefault(key, []).append(product["share"])
    ordered = sorted(groups.items(), key=lambda item: (-sum(item[1]), item[0]))
    return [
        (wanted, found, str(len(shares)), f"{sum(shares):.1%}", verdict, reason)
        for (wanted, found, verdict, reason), shares in ordered
    ]


def _recipe(recipe: Mapping[str, Any]) -> Iterator[str]:
    if recipe["products"] is None:
        yield f"Quantised bundle: {recipe['reason']}."
        return
    counts = ", ".join(f"{count} {verdict}" for verdict, count in recipe["counts"].items())
    yield f"Products beside the recipe `{recipe['name']}`: {counts}."
    yield ""
    yield from _table(("recipe", "found", "products", "share", "verdict", "reason"), recipe_rows(recipe))
    unexplained = [product["name"] for product in recipe["products"] if product["verdict"] == HIGHER]
    if unexplained:
        yield ""
        yield f"Unexplained: {', '.join(unexplained)}."


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(headers)} |"
    yield f"|{'---|' * len(headers)}"
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"
