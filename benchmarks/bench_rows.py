"""Rows of a bench document: one for each candidate, with what its figures mean beside the others'."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from proteus_deploy.testing import relative_error

if TYPE_CHECKING:
    from torch import Tensor

    from proteus_deploy.benchmarks.candidates import Candidate

__all__ = ["compare", "new_row", "words"]

BASELINE_PRECISIONS = ("fp32", "bf16")


def new_row(candidate: Candidate, size: str, status: str, reason: str = "") -> dict[str, Any]:
    """status: "ok", "failed" or "not measured"; reason: why not."""
    return {
        "case": candidate.name,
        "size": size,
        "backend": candidate.backend,
        "plan": candidate.form,
        "precision": candidate.precision,
        "recipe": candidate.recipe or None,
        "status": status,
        "reason": reason,
    }


def words(error: BaseException) -> str:
    """Of an error, for its row."""
    return str(error) or type(error).__name__


def compare(
    rows: Sequence[dict[str, Any]],
    latents: Mapping[str, Tensor | None],
    ceilings: Mapping[str, float],
    flops: int | None,
) -> None:
    """Fill in speedups over the published form, errors against it in fp32, and the floor of a step.

    latents: what each candidate's last loop ended with.
    """
    measured = {row["case"]: row for row in rows if row["status"] == "ok"}
    for row in measured.values():
        _add_speedups(row, measured, "latency_ms", "speedup_vs_published")
        truth = truth_of(row, measured, first="fp32")
        row["relative_to"] = truth
        mine, want = latents[row["case"]], None if truth is None else latents[truth]
        row["relative_error"] = None if mine is None or want is None else relative_error(mine, want)
        # Products of codes have rates of their own, and no kernel of all the formats is there to measure.
        rate = None if row["recipe"] else ceilings.get(f"products_{row['precision']}")
        floor = None if flops is None or rate is None else 1e3 * flops / rate
        row["floor_ms"] = floor
        # A plan's steps have one row or two; the floor is that of two.
        comparable = floor is not None and row["plan"] != "plan"
        row["share_of_floor"] = floor / row["step_ms"]["median"] if comparable and floor is not None else None


def compare_requests(rows: Sequence[dict[str, Any]], videos: Mapping[str, Any]) -> None:
    """The same for whole requests: speedups, and how near the videos are to the published form's.

    videos: frames of each candidate, uint8 [F, H, W, 3].
    """
    from proteus_deploy.evaluate.pixel_metrics import psnr

    measured = {row["case"]: row for row in rows if "request_ms" in row}
    for row in measured.values():
        _add_speedups(row, measured, "request_ms", "request_speedup_vs_published")
        truth = truth_of(row, measured, first=row["precision"])
        row["psnr_to"] = truth
        row["psnr_db"] = None if truth is None else psnr(videos[row["case"]], videos[truth])


def truth_of(row: Mapping[str, Any], measured: Mapping[str, Any], *, first: str) -> str | None:
    """The published form that a row is compared with: in precision `first`, else fp32, else its own."""
    names = (f"published:eager:{precision}" for precision in (first, "fp32", row["precision"]))
    return next((name for name in names if name in measured), None)


def _add_speedups(row: dict[str, Any], measured: Mapping[str, Any], times: str, key: str) -> None:
    for precision in BASELINE_PRECISIONS:
        baseline = measured.get(f"published:eager:{precision}")
        ratio = None if baseline is None else baseline[times]["median"] / row[times]["median"]
        row[f"{key}_{precision}"] = ratio
