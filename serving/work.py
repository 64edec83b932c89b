"""The jobs that a worker has at hand, one or a batch, and why one of them isn't wanted any more."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from proteus_deploy.serving.jobs import Claim

if TYPE_CHECKING:
    from proteus_deploy.serving.previews import Previews

__all__ = ["Work"]


class Work:
    """The jobs at hand. What makes some of them is stopped when none of those is wanted any more: `stop_of`.

    news: the last that was told of each job, by its id.
    states: of those that ended, which in a batch may be before the others.
    """

    def __init__(self, claims: Sequence[Claim]) -> None:
        self.claims = tuple(claims)
        self.done = threading.Event()
        self.previews: Previews | None = None
        self.measures: dict[str, Any] = {}  # of a batch that was made
        self.news: dict[str, dict[str, Any]] = {}
        self.states: dict[str, str] = {}
        self._reasons: dict[str, str] = {}
        self._stops: dict[frozenset[str], threading.Event] = {}

    @property
    def left(self) -> list[Claim]:
        """Those that haven't ended."""
        return [claim for claim in self.claims if claim.job.id not in self.states]

    def end(self, claim: Claim, state: str) -> None:
        """The job has ended, and nothing more is told of it."""
        self.states[claim.job.id] = state
        self.drop(claim, "ended")

    def drop(self, claim: Claim, reason: str) -> None:
        """Why a job isn't wanted; the first reason counts."""
        self._reasons.setdefault(claim.job.id, reason)
        self._set_stops()

    def drop_all(self, reason: str) -> None:
        for claim in self.claims:
            self.drop(claim, reason)

    def stop_of(self, *claims: Claim) -> threading.Event:
        """Set when none of these jobs is wanted any more."""
        stop = self._stops.setdefault(frozenset(claim.job.id for claim in claims), threading.Event())
        self._set_stops()  # it may be so already
        return stop

    def _set_stops(self) -> None:
        for jobs, stop in list(self._stops.items()):
            if jobs <= self._reasons.keys():
                stop.set()

    def reason(self, claim: Claim) -> str | None:
        """Why the job isn't wanted; None while it is."""
        return self._reasons.get(claim.job.id)
