"""How `inspect` shows the quantisation of a bundle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from proteus_deploy.cli.output import print_table

if TYPE_CHECKING:
    from proteus_deploy.bundle import Bundle


def describe_quantisation(bundle: Bundle) -> dict[str, Any]:
    """{"quantization": …} for `inspect --json`, empty for a bundle that isn't quantised.

    layers: for each graph how many layers have which precision; high: those left as exported, by reason.
    """
    field = bundle.manifest.get("quantization")
    if field is None:
        return {}
    layers: dict[str, dict[str, int]] = {}
    high: dict[str, dict[str, int]] = {}
    for graph in bundle.table.graphs:
        record = bundle.manifest["graphs"][graph.name].get("quantization")
        if record is None:
            continue
        attention = {f"{name} (attention)": entry for name, entry in record.get("attention", {}).items()}
        for name, entry in {**record["layers"], **attention}.items():
            kind = entry["precision"]
            if kind == "as exported":
                _count(high.setdefault(graph.name, {}), entry["reason"])
            else:
                _count(
                    layers.setdefault(graph.name, {}), f"{kind}{' attention' if name in attention else ''}"
                )
    statistics = field["statistics"]
    return {
        "quantization": {
            "recipe": field["recipe"]["name"],
            "recipe_hash": field["recipe_hash"],
            "statistics_hash": None if statistics is None else statistics["hash"],
            "layers": layers,
            "high": high,
        }
    }


def _count(found: dict[str, int], key: str) -> None:
    found[key] = found.get(key, 0) + 1


def print_quantisation(document: Mapping[str, Any]) -> None:
    """One table: recipe, then layers by precision, then what stays high and why."""
    statistics = document["statistics_hash"]
    rows: list[tuple[object, ...]] = [
        ("recipe hash", "", document["recipe_hash"][:16], ""),
        ("statistics", "", "none" if statistics is None else statistics[:16], ""),
    ]
    for graph, counts in document["layers"].items():
        rows += [(graph, count, kind, "") for kind, count in sorted(counts.items())]
        reasons = document["high"].get(graph, {})
        rows += [(graph, count, "as exported", reason) for reason, count in sorted(reasons.items())]
    print_table((f"quantised by {document['recipe']}", "layers", "precision", "why"), rows)
