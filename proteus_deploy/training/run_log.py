"""What a run writes down: lines of JSON, the same numbers as TensorBoard events, and scores of samples."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from proteus_deploy.errors import BackendError
from proteus_deploy.training.state import drop_later_lines

__all__ = ["RunLog"]


class RunLog:
    """log.jsonl, samples.jsonl and tensorboard/ in the folder of a run; main process only."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._events: Any = None

    def drop_after(self, step: int) -> None:
        """Forget what was written about steps after the one that training goes on from."""
        for name in ("log.jsonl", "samples.jsonl"):
            drop_later_lines(self.folder / name, step)

    def step(self, step: int, numbers: Mapping[str, float], seconds: float) -> None:
        """A line about an optimiser step; seconds: spent on training so far, in all sittings."""
        rounded = {key: float(f"{value:.6g}") for key, value in numbers.items()}
        self._append("log.jsonl", {"step": step, **rounded, "seconds": round(seconds, 1)})
        self._write_events("train", step, numbers)

    def scores(self, step: int, scores: Mapping[str, float | None]) -> None:
        """How alike the people of the sample videos are to their photos; None where it wasn't measured."""
        self._append("samples.jsonl", {"step": step, "face_sim_arc": dict(scores)})
        measured = {key: value for key, value in scores.items() if value is not None}
        if measured:
            measured["mean"] = sum(measured.values()) / len(measured)
            self._write_events("face_sim_arc", step, measured)

    def close(self) -> None:
        """Close the file of events; the next number opens another."""
        if self._events is not None:
            self._events.close()
            self._events = None

    def _append(self, name: str, line: Mapping[str, Any]) -> None:
        with (self.folder / name).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")

    def _write_events(self, group: str, step: int, numbers: Mapping[str, float]) -> None:
        if self._events is None:
            self._events = _event_writer(self.folder / "tensorboard", step)
        for key, value in numbers.items():
            self._events.add_scalar(f"{group}/{key}", value, step)
        self._events.flush()


def _event_writer(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise BackendError(
            "training writes TensorBoard events; pip install 'proteus-deploy[train]'"
        ) from error
    # Of steps that were lost and are trained again, TensorBoard shows the later ones.
    return SummaryWriter(str(folder), purge_step=step)
