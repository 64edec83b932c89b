"""Pictures of running steps, for clients that look on: one frame of what the video is going to be."""

from __future__ import annotations

import base64
import io
import logging
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from proteus_deploy.pipeline import StepEvent

__all__ = ["Previews"]

_log = logging.getLogger(__name__)

_SIDE = 320  # pixels of the longer side
_QUALITY = 70
# Of the time between two pictures so much at most goes into drawing one, and so many seconds lie between.
_SHARE, _LEAST_S = 0.1, 1.0


class Previews:
    """Those of the jobs at hand. `watch` and `on_step` from any thread.

    draw(event, place): the picture [H, W, 3] uint8 of one video of the batch. send(row of the job, data URL).
    """

    def __init__(
        self,
        draw: Callable[[StepEvent, int], NDArray[np.uint8]],
        send: Callable[[int, str], Any],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._draw, self._send, self._clock = draw, send, clock
        self._watched: set[int] = set()
        self._next_s: dict[tuple[int, ...], float] = {}  # of each batch

    def watch(self, row: int) -> None:
        """Somebody looks at this job's video."""
        self._watched.add(row)

    def unwatch(self, row: int) -> None:
        """Nobody does any more."""
        self._watched.discard(row)

    def on_step(self, event: StepEvent, rows: Sequence[int]) -> None:
        """Draw what is looked at, unless it was drawn lately. Behind the last step comes the video.

        rows: of the jobs in the event's batch, in its order.
        """
        batch, began_s = tuple(rows), self._clock()
        watched = [(place, row) for place, row in enumerate(batch) if row in self._watched]
        if not watched or began_s < self._next_s.get(batch, 0.0) or event.index + 1 == event.total:
            return
        try:
            for place, row in watched:
                self._send(row, _data_url(self._draw(event, place)))
        except Exception:  # noqa: BLE001 - looking on must not end the video, whatever a backend raises
            _log.exception("no more pictures of this batch")
            self._next_s[batch] = float("inf")
            return
        ended_s = self._clock()
        self._next_s[batch] = ended_s + max(_LEAST_S, (ended_s - began_s) * (1 / _SHARE - 1))


def _data_url(pixels: NDArray[np.uint8]) -> str:
    from PIL import Image

    picture = Image.fromarray(pixels)
    picture.thumbnail((_SIDE, _SIDE))
    stream = io.BytesIO()
    picture.save(stream, "jpeg", quality=_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()
