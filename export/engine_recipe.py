"""The products of an engine beside the recipe that its graph was quantised with: what is high, and why.

Every product gets one of four verdicts. "as asked": each operand has the type that the recipe names.
"explained": it is high because the recipe keeps it, or because it is no Linear layer, and the reason is
quoted. "unexplained": the recipe asks for fewer bits than the product has, or for a product that isn't there.
"not asked for": it has fewer bits, or others, than the recipe asks for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from proteus_deploy.export.engine_findings import UNASKED, UNEXPLAINED, Finding, named, worst_first
from proteus_deploy.export.engine_layers import BITS, CONVOLUTIONS, PRODUCTS, QUANTISED, as_json
from proteus_deploy.export.recipe import Keep, Recipe, matches

AS_ASKED, EXPLAINED, HIGHER, NOT_ASKED = "as asked", "explained", "unexplained", "not asked for"
VERDICTS = (AS_ASKED, EXPLAINED, HIGHER, NOT_ASKED)

_CODES = {"int8": "int8", "fp8_e4m3": "fp8", "int4": "int4", "nvfp4": "fp4"}  # a recipe's words -> ours
_PRECISION = re.compile(r"(?P<weight>\w+)(?: in blocks of \d+)?(?: x (?P<activation>\w+))?")
_AS_EXPORTED = "as exported"
_PROJECTION = re.compile(r"(?P<attention>.+)\.to_[qkv]")


@dataclass(frozen=True)
class ProductVerdict:
    """One product. name: of the Linear layer, else of the weight or the ONNX node.

    wanted: precision in the recipe's words, "" where it knows no such layer. found: dtypes of the operands,
    activations first, as "bf16 x int8". reason: why it is as it is. share: of the engine's FLOPs, 0 to 1.
    """

    name: str
    node: str
    wanted: str
    found: str
    verdict: str
    reason: str
    share: float


def add_recipe(
    report: Mapping[str, Any], graph: str, plan: Mapping[str, Any] | None, recipe: Recipe
) -> dict[str, Any]:
    """The report of a graph with the field "recipe" and the findings that follow from it.

    plan: what the bundle's manifest says of the graph (`GraphPlan.to_json`), None where the recipe leaves
    the graph as exported. The field: {name, counts {verdict: products}, products}; for such a graph the
    products are None, and "reason" says why.
    """
    if plan is None:
        reason = f"recipe {recipe.name!r} leaves this graph as exported"
        return {**report, "recipe": {"name": recipe.name, "counts": {}, "products": None, "reason": reason}}
    verdicts = judge(report, graph, plan, recipe)
    earlier = [Finding.from_json(entry) for entry in report["findings"]]
    counts = {verdict: sum(one.verdict == verdict for one in verdicts) for verdict in VERDICTS}
    products = [as_json(verdict) for verdict in verdicts]
    return {
        **report,
        "recipe": {"name": recipe.name, "counts": counts, "products": products},
        "findings": [as_json(finding) for finding in worst_first([*earlier, *_findings(verdicts)])],
    }


def judge(
    report: Mapping[str, Any], graph: str, plan: Mapping[str, Any], recipe: Recipe
) -> list[ProductVerdict]:
    """A verdict for each product of the report, in its order, then for layers that have no product."""
    judged = _Judge(plan["layers"], plan.get("attention", {}), recipe.graphs[graph].keep)
    total = max(report["flops"], 1)
    found, seen = [], set()
    for row in report["layers"]:
        if row["operator"] not in PRODUCTS and row["operator"] != "attention":
            continue
        operands = _operands(row)
        name, wanted, verdict, reason = judged(row, operands)
        seen.add(name)
        share = row["flops"] / total
        found.append(ProductVerdict(name, row["name"], wanted, " x ".join(operands), verdict, reason, share))
    seen |= {name.partition(": ")[0] for name in seen}  # an attention's products are "attention: node"
    for part, reason in (
        ("layers", "no product reads a weight of its name"),
        ("attention", "no product reads its projections"),
    ):
        for name, entry in plan.get(part, {}).items():
            if entry["precision"] != _AS_EXPORTED and name not in seen:
                wanted = entry["precision"]
                found.append(ProductVerdict(name, "", wanted, "no product", HIGHER, reason, 0.0))
    return found


@dataclass(frozen=True)
class _Judge:
    """layers, attention: {name: {precision, reason}} of the plan. keep: of the recipe."""

    layers: Mapping[str, Mapping[str, str]]
    attention: Mapping[str, Mapping[str, str]]
    keep: Sequence[Keep]

    def __call__(self, row: Mapping[str, Any], operands: Sequence[str]) -> tuple[str, str, str, str]:
        """Name, precision wanted, verdict and reason of one product."""
        layer = _layer_of(row["weight"])
        if layer in self.layers:
            return layer, *_compare(operands, self.layers[layer])
        if row["operator"] in CONVOLUTIONS:
            name, reason = layer or row["name"], f"a {row['operator']}: recipes name Linear layers"
            return name, "", *_outside(operands, self._kept([layer]) or reason)
        if row["weight"]:
            reason = self._kept([layer]) or "its constant is no Linear layer's weight: no rule can name it"
            return row["weight"], "", *_outside(operands, reason)
        near = [_layer_of(weight) for weight in row["near"]]
        modules = [match["attention"] for name in near if (match := _PROJECTION.fullmatch(name))]
        label = f"{modules[0] if modules else near[0] if near else 'inputs'}: {row['name']}"
        for module in modules:
            if module in self.attention:
                return label, *_compare(operands, self.attention[module], every=True)
        near.sort(key=lambda name: _PROJECTION.fullmatch(name) is None)  # the attention's own first
        reason = self._kept(near) or "a product of activations: no Linear layer, and no rule for attention"
        return label, "", *_outside(operands, reason)

    def _kept(self, names: Sequence[str]) -> str:
        """The reason that keeps the first of `names` which an entry of the recipe names; "" for none."""
        known = tuple(self.layers)
        found = (keep.reason for name in names for keep in self.keep if matches(keep.layers, name, known))
        return next(found, "")


def _compare(
    operands: Sequence[str], entry: Mapping[str, str], *, every: bool = False
) -> tuple[str, str, str]:
    """Precision wanted, verdict and reason of a product that the plan knows.

    every: one format is asked of all operands, as of attention's; else the format alone is the weight's.
    """
    wanted, reason = entry["precision"], entry["reason"]
    asked = _asked(wanted, len(operands), every=every)
    pairs = list(zip(operands, asked, strict=True))
    if any(want in QUANTISED and BITS.get(found, 32) > BITS[want] for found, want in pairs):
        return wanted, HIGHER, f"{reason}, and nothing says why it is not followed"
    if any(found in QUANTISED and found != want for found, want in pairs):
        return wanted, NOT_ASKED, reason
    return wanted, EXPLAINED if wanted == _AS_EXPORTED else AS_ASKED, reason


def _outside(operands: Sequence[str], reason: str) -> tuple[str, str]:
    """Verdict and reason of a product that the plan doesn't know."""
    coded = any(dtype in QUANTISED for dtype in operands)
    return NOT_ASKED if coded else EXPLAINED, reason


def _asked(precision: str, count: int, *, every: bool) -> tuple[str, ...]:
    """Dtypes that a plan's words ask of the operands, the weight last; "" where they ask for nothing."""
    if precision == _AS_EXPORTED:
        return ("",) * count
    match = _PRECISION.fullmatch(precision)
    assert match is not None, precision
    code = _CODES[match["weight"]]
    if every:
        return (code,) * count
    activation = "" if match["activation"] is None else _CODES[match["activation"]]
    return (*(activation,) * (count - 1), code)


def _layer_of(weight: str) -> str:
    """The Linear layer that a constant belongs to, as recipes name it; the constant's own name for others."""
    return weight.removesuffix(".codes").removesuffix(".weight")


def _operands(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Dtypes of what is multiplied. An engine that was inspected may multiply in more bits than it was told.

    Weights of few bits beside high activations are multiplied in the type of the activations: as handed.
    """
    operands, taken = tuple(row["operands"]), row["taken"]
    if taken is not None and taken not in QUANTISED and all(dtype in QUANTISED for dtype in operands):
        return (taken,) * len(operands)
    return operands


def _findings(verdicts: Sequence[ProductVerdict]) -> Iterator[Finding]:
    higher = [one for one in verdicts if one.verdict == HIGHER]
    if higher:
        first, names = higher[0], tuple(one.name for one in higher)
        which = f"of {first.name} " if len(higher) > 1 else ""
        asked = f"{which}the recipe asks for {first.wanted}, found is {first.found} ({first.reason})"
        text = f"{named(names)}: {asked}"
        yield Finding(UNEXPLAINED, text, names, sum(one.share for one in higher))
    other = [one for one in verdicts if one.verdict == NOT_ASKED]
    if other:
        first, names = other[0], tuple(one.name for one in other)
        which = f"of {first.name} " if len(other) > 1 else ""
        wanted = first.wanted or "nothing"
        text = f"{named(names)}: {which}found is {first.found}, the recipe asks for {wanted} ({first.reason})"
        yield Finding(UNASKED, text, names, sum(one.share for one in other))
