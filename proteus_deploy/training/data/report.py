"""What became of each clip of a source: accepted, or left out for a reason that stands in the report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from proteus_deploy.errors import InputError

__all__ = ["ClipRejected", "DataReport", "Note", "Reason", "Rejection"]

_LISTED = 20


class Reason(StrEnum):
    """Why a clip is left out. The published training set was filtered for the first two as well."""

    NO_FACE = "no face"
    SEVERAL_FACES = "several faces"
    UNREADABLE_VIDEO = "unreadable video"
    NO_CAPTION = "no caption"
    NO_IDENTITY_CAPTION = "no identity caption"
    TOO_FEW_FRAMES = "too few frames"
    TOO_SMALL = "too small"
    WRONG_MASK = "wrong mask"
    NO_REFERENCE = "no reference outside the clip"
    UNUSABLE_REFERENCE = "unusable reference photo"
    NOT_FINITE = "not finite"


class Note(StrEnum):
    """What is worth counting about a clip that was accepted."""

    NO_PERSON_MASK = "no person mask: motion counts on the whole frame"
    NO_HEAD_MASK = "no head mask: the head loss passes this clip over"
    NO_FACE_MASK = "no face mask: the face loss passes this clip over"
    REFERENCE_INSIDE = "reference photo from inside the clip"
    PHOTOS_LEFT_OUT = "some reference photos unusable"
    LONG_PROMPT = "prompt fills every token, and may be cut"
    LONG_IDENTITY_PROMPT = "identity prompt fills every token, and may be cut"


class ClipRejected(InputError):
    """One clip can't be used. The message says what was found, without the clip's name."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type[ClipRejected], tuple[Reason, str]]:
        return ClipRejected, (self.reason, str(self))


@dataclass(frozen=True)
class Rejection:
    """A clip that was left out: its name, the reason, and what exactly was found."""

    name: str
    reason: Reason
    message: str


@dataclass(frozen=True)
class DataReport:
    """accepted: clips in the set. reused: those of them that an earlier run had encoded. notes: how many
    accepted clips each note was made about."""

    accepted: int
    reused: int
    rejections: tuple[Rejection, ...] = ()
    notes: Mapping[str, int] = field(default_factory=dict)

    @property
    def seen(self) -> int:
        """All clips of the source."""
        return self.accepted + len(self.rejections)

    @property
    def counts(self) -> dict[str, int]:
        """How many clips were left out, by reason, in the order of `Reason`."""
        found = Counter(rejection.reason for rejection in self.rejections)
        return {reason.value: found[reason] for reason in Reason if found[reason]}

    def text(self, *, listed: int = _LISTED) -> str:
        """Lines for a terminal; of the clips left out, the first `listed` by name."""
        encoded = self.accepted - self.reused
        lines = [
            f"{self.accepted} of {self.seen} clips accepted, {encoded} encoded now, {self.reused} before"
        ]
        lines += [f"  note: {count} x {note}" for note, count in sorted(self.notes.items())]
        lines += [f"  left out: {count} x {reason}" for reason, count in self.counts.items()]
        lines += [f"    {one.name}: {one.reason}: {one.message}" for one in self.rejections[:listed]]
        if len(self.rejections) > listed:
            lines.append(f"    … and {len(self.rejections) - listed} more")
        return "\n".join(lines)

    def document(self) -> dict[str, Any]:
        """For JSON; `from_document` reads it back."""
        return {
            "seen": self.seen,
            "accepted": self.accepted,
            "reused": self.reused,
            "counts": self.counts,
            "notes": dict(sorted(self.notes.items())),
            "rejections": [
                {"name": one.name, "reason": one.reason.value, "message": one.message}
                for one in self.rejections
            ],
        }

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> DataReport:
        """Raises KeyError, TypeError or ValueError on a document that `document` didn't make."""
        return cls(
            int(document["accepted"]),
            int(document["reused"]),
            tuple(
                Rejection(str(one["name"]), Reason(one["reason"]), str(one["message"]))
                for one in document["rejections"]
            ),
            {str(note): int(count) for note, count in document["notes"].items()},
        )
