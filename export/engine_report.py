"""The report of one engine: what was asked for, what it took, and why it would not be faster.

There are two sources, and a report names its own. From the network handed to the builder, anywhere: the
precision asked for and what can't be fused. From the engine's inspector, on a GPU of the target: the
precision taken, what was fused, reformat layers, Q/DQ pairs left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from proteus_deploy.errors import InputError
from proteus_deploy.export.engine_attention import NEEDLESS, Attention, find_attention
from proteus_deploy.export.engine_findings import (
    GATES,
    REFORMAT,
    SLOWER,
    UNFOLDED,
    UNFUSED,
    Finding,
    find_reasons,
    is_quantised,
    named,
    worst_first,
)
from proteus_deploy.export.engine_inspector import InspectedEngine
from proteus_deploy.export.engine_layers import PRODUCTS, QUANTISED, LayerGraph, as_json
from proteus_deploy.export.engine_precisions import Precisions

HANDED = "as handed to the builder, not as built"
INSPECTED = "as built, from the engine's inspector"
FUSED, NOT_FUSED = "fused", "not fused"


def report_network(graph: LayerGraph, dtype: str) -> dict[str, Any]:
    """The report from the network alone. dtype: of the graph's "float" tensors (fp32, fp16, bf16).

    {source, quantised, flops, bytes, precisions {precision: share of the products' FLOPs}, attention,
    reformats (None: unknown), findings, layers}. JSON-able.
    """
    precisions = Precisions(graph)
    rows = precisions.rows
    return {
        "source": HANDED,
        "quantised": is_quantised(precisions),
        "flops": sum(row.flops for row in rows),
        "bytes": sum(row.bytes for row in rows),
        "precisions": _product_shares(precisions),
        "attention": [_attention(attention) for attention in find_attention(precisions)],
        "reformats": None,
        "findings": [as_json(finding) for finding in find_reasons(precisions, dtype)],
        "layers": [as_json(row) for row in rows],
    }


def add_inspection(report: Mapping[str, Any], engine: InspectedEngine) -> dict[str, Any]:
    """The same report with what the engine's inspector says; findings of the network that it refutes go."""
    if not engine.detailed:
        return dict(report)
    layers = [{**row, "taken": engine.taken(row["name"])} for row in report["layers"]]
    attention = [_fusion(entry, engine) for entry in report["attention"]]
    pairs = frozenset(row["name"] for row in layers if row["operator"] in ("quantize", "dequantize"))
    share = {row["name"]: row["flops"] / max(report["flops"], 1) for row in layers}
    earlier = [Finding.from_json(entry) for entry in report["findings"]]
    findings = [finding for finding in earlier if finding.code not in (UNFUSED, UNFOLDED)]
    findings += _unfused(attention, share) + _left(engine, pairs) + _reformats(engine)
    findings += _slower(layers, share)
    return {
        **report,
        "source": INSPECTED,
        "attention": attention,
        "reformats": list(engine.reformats),
        "findings": [as_json(finding) for finding in worst_first(findings)],
        "layers": layers,
    }


def check_gates(gates: Sequence[str], inspected: bool) -> None:
    """Raises InputError for a gate that can't be decided: `inspected` says whether engines will be."""
    for gate in gates:
        if gate not in GATES:
            raise InputError(f"--fail-on {gate!r} is unknown; choose from {', '.join(GATES)}")
    if REFORMAT in gates and not inspected:
        raise InputError(
            f"--fail-on {REFORMAT} can't be decided here: reformat layers are seen in a finished engine "
            "only, on a GPU of its target; leave it out, or build on that GPU"
        )


def failures(report: Mapping[str, Any], gates: Sequence[str]) -> list[str]:
    """A sentence for each finding that a gate forbids; it names the layers."""
    return [
        f"{finding['code']}: {finding['text']}" for finding in report["findings"] if finding["code"] in gates
    ]


def _product_shares(precisions: Precisions) -> dict[str, float]:
    flops: dict[str, int] = {}
    for layer in precisions.products:
        asked = precisions.asked(layer)
        flops[asked] = flops.get(asked, 0) + precisions.flops(layer)
    whole = sum(flops.values()) or 1
    return {name: count / whole for name, count in sorted(flops.items(), key=lambda item: -item[1])}


def _attention(attention: Attention) -> dict[str, Any]:
    """state: what the network's form allows; taken: what the engine did, None where none was inspected."""
    return {**as_json(attention), "taken": None}


def _fusion(entry: Mapping[str, Any], engine: InspectedEngine) -> dict[str, Any]:
    fused = engine.fused(tuple(entry["nodes"]))
    if fused is None:
        return dict(entry)
    return {**entry, "taken": FUSED if fused else NOT_FUSED}


def _unfused(attention: Sequence[Mapping[str, Any]], share: Mapping[str, float]) -> list[Finding]:
    """Attentions that the inspector shows apart; what needn't be fused is left out."""
    apart = [entry for entry in attention if entry["taken"] == NOT_FUSED and entry["state"] != NEEDLESS]
    if not apart:
        return []
    names = tuple(entry["name"] for entry in apart)
    written = sum(entry["scores_bytes"] for entry in apart)
    reason = next((entry["reason"] for entry in apart if entry["reason"]), "")
    text = (
        f"attention {named(names)} was not fused{f' ({reason})' if reason else ''}: its scores "
        f"({written / 2**20:.1f} MiB at the tuned sizes) are written and read again"
    )
    held = sum(share.get(node, 0) for entry in apart for node in entry["nodes"])
    return [Finding(UNFUSED, text, names, held)]


def _slower(layers: Sequence[Mapping[str, Any]], share: Mapping[str, float]) -> list[Finding]:
    """Products that the engine computes in more bits than the network asks for."""
    wider = [
        row
        for row in layers
        if row["asked"] in QUANTISED and row["taken"] is not None and row["taken"] not in QUANTISED
    ]
    wider = [row for row in wider if row["operator"] in PRODUCTS]
    if not wider:
        return []
    labels = tuple(row["weight"] or row["name"] for row in wider)
    text = f"{named(labels)}: asked for in {wider[0]['asked']}, the engine computes in {wider[0]['taken']}"
    return [Finding(SLOWER, text, labels, sum(share.get(row["name"], 0) for row in wider))]


def _left(engine: InspectedEngine, pairs: frozenset[str]) -> list[Finding]:
    left = engine.alone(pairs)
    if not left:
        return []
    return [
        Finding(UNFOLDED, f"the engine runs {named(left)} as layers of their own: Q/DQ not folded", left, 0.0)
    ]


def _reformats(engine: InspectedEngine) -> list[Finding]:
    names = engine.reformats
    if not names:
        return []
    text = f"{len(names)} reformat layers copy tensors between layouts or types: {named(names)}"
    return [Finding(REFORMAT, text, names, 0.0)]
