"""What the project says of a GPU, each with the figure that a run measured, or why it measured none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["claims_of"]

_KERNELS = ("modulated norm", "QK norm and rotary", "gated residual and norm")
_FIRST = "identity attention"
_ATTENTION = ("joint attention, int8", "joint attention, fp8")
_DECODE = "decode attention"  # of 32 images; a single one is too small to fill a GPU


def claims_of(results: Mapping[str, Mapping[str, Any]]) -> list[dict[str, str]]:
    """{"claim", "measured", "verdict"}, of "holds", "FAILS" or "not known".

    results: of the parts "kernels" and "loop", as far as they got.
    """
    kernels = {row["kernel"]: row for row in results.get("kernels", {}).get("rows", [])}
    first = kernels.get(_FIRST, {})
    why = _why_not(results, "kernels", list(kernels.values()))
    claims = [
        _claim("identity attention over the eager form", _ratio(first), 3, "x", why),
        _claim("identity attention, share of its floor", _share(first), 0.7, "", why),
    ]
    claims += [
        _claim(f"{name}, share of its floor", _share(kernels.get(name, {})), 0.8, "", why)
        for name in _KERNELS
    ]
    claims += [
        _claim(f"{name}, over PyTorch's own", _ratio(kernels.get(name, {}), "eager"), 1, "x", why)
        for name in _ATTENTION
    ]
    decode = kernels.get(_DECODE, {})
    claims += [
        _claim(f"{_DECODE} over the eager form", _ratio(decode), 1, "x", why),
        _claim(f"{_DECODE}, share of its floor", _share(decode), 0.7, "", why),
    ]
    rows = results.get("loop", {}).get("rows", [])
    why = _why_not(results, "loop", rows)
    return [*claims, _claim("the exact loop over the published form", _best_exact(rows), 1.6, "x", why)]


def _claim(text: str, value: float | None, least: float, unit: str, why: str) -> dict[str, str]:
    if value is None:
        return {"claim": text, "measured": f"not measured: {why}", "verdict": "not known"}
    verdict = "holds" if value >= least else "FAILS"
    return {"claim": text, "measured": f"{value:.2f}{unit}, {least:g}{unit} claimed", "verdict": verdict}


def _ratio(row: Mapping[str, Any], over: str = "published") -> float | None:
    ratio: float | None = row.get("speedup", {}).get(over)
    return ratio


def _share(row: Mapping[str, Any]) -> float | None:
    share: float | None = row.get("share_of_floor")
    return share


def _best_exact(rows: list[Mapping[str, Any]]) -> float | None:
    """The published form's time by that of the fastest exact loop."""
    medians = {row["case"]: row["latency_ms"]["median"] for row in rows if row["status"] == "ok"}
    published = [time for case, time in medians.items() if case.startswith("published:")]
    exact = [time for case, time in medians.items() if case.startswith("exact:")]
    return published[0] / min(exact) if published and exact else None


def _why_not(results: Mapping[str, Mapping[str, Any]], part: str, rows: list[Mapping[str, Any]]) -> str:
    """In words, for the claims of a part that has no figure for them."""
    result = results.get(part)
    if result is None:
        return f"the part {part!r} was not reached"
    if "reason" in result:
        return f"{result['status']}: {result['reason']}"
    reasons = [
        f"{row.get('case') or row.get('kernel')}: {row['reason']}" for row in rows if row.get("reason")
    ]
    return "; ".join(reasons) or "it has no row for it"
