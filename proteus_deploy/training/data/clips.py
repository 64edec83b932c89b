"""What a clip is, and what a source of clips is.

Axes: F frames, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from proteus_deploy.training.data.report import ClipRejected, Note, Reason

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from proteus_deploy.identity.faces import Face

__all__ = ["ClipLoader", "ClipSample", "ClipSource", "FaceFinder"]

# RGB uint8 [H, W, 3] -> the faces in it, from left to right.
FaceFinder = Callable[["NDArray[np.uint8]"], "list[Face]"]


@dataclass(frozen=True, eq=False)
class ClipSample:
    """One clip, ready to be encoded.

    frames: uint8 [F, H, W, 3], RGB, already chosen, brought to size and cut. Masks: bool [F, H, W] or None;
    no person mask means the whole frame, no head or face mask that the masked loss passes the clip over.
    references: RGB uint8 photos of the same person, of any sizes, at least one.

    Raises ClipRejected where a mask hasn't the shape of the frames, or a caption is empty.
    """

    name: str
    frames: NDArray[np.uint8]
    caption: str
    identity_caption: str
    references: tuple[NDArray[np.uint8], ...]
    person_mask: NDArray[np.bool_] | None = None
    head_mask: NDArray[np.bool_] | None = None
    face_mask: NDArray[np.bool_] | None = None
    notes: tuple[Note, ...] = ()

    def __post_init__(self) -> None:
        shape = self.frames.shape
        for name in ("person", "head", "face"):
            mask = getattr(self, f"{name}_mask")
            if mask is not None and (mask.shape != shape[:3] or mask.dtype != bool):
                raise ClipRejected(
                    Reason.WRONG_MASK,
                    f"the {name} mask is {mask.dtype} {list(mask.shape)}; expected bool {list(shape[:3])}",
                )
        if not self.caption.strip():
            raise ClipRejected(Reason.NO_CAPTION, "the caption is empty; write what the clip shows")
        if not self.identity_caption.strip():
            raise ClipRejected(
                Reason.NO_IDENTITY_CAPTION, "the identity caption is empty; write how the person looks"
            )
        if not self.references:
            raise ClipRejected(Reason.NO_REFERENCE, "the clip has no reference photo")


class ClipLoader(Protocol):
    """One clip that isn't loaded yet. Can be pickled, so that another process loads it."""

    def fingerprint(self) -> str:
        """Hex digest of everything that decides what `load` gives: bytes of files, or seeds, and options."""
        ...

    def load(self, find_faces: FaceFinder) -> ClipSample:
        """The clip. Raises ClipRejected when it can't be used."""
        ...


class ClipSource(Protocol):
    """Clips by name, each with its loader; iterating loads none of them. Yields the same order each time."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[tuple[str, ClipLoader]]: ...
