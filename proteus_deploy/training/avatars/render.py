"""Draw a person in a scene on every frame, with masks and the true optical flow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from proteus_deploy.training.avatars.canvas import Canvas, Part, Space
from proteus_deploy.training.avatars.draw_face import draw_face, draw_glasses
from proteus_deploy.training.avatars.draw_hair import draw_back_hair, draw_front_hair, draw_hat
from proteus_deploy.training.avatars.draw_scene import draw_arm, draw_body, draw_wall
from proteus_deploy.training.avatars.geometry import EYE_Y, HEAD_REACH, MOUTH_Y, Geometry

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from proteus_deploy.training.avatars.clothing_and_scene import Scene
    from proteus_deploy.training.avatars.identity import Identity
    from proteus_deploy.training.avatars.motion import Poses


__all__ = ["Rendering", "render"]


@dataclass(frozen=True, eq=False)
class Rendering:
    """frames: uint8 [F, H, W, 3], RGB. parts: uint8 [F, H, W], what each pixel shows (`canvas.Part`).

    flow: float32 [F - 1, H, W, 2], or empty when not asked for. landmarks: float32 [F, 5, 2].
    """

    frames: NDArray[np.uint8]
    parts: NDArray[np.uint8]
    flow: NDArray[np.float32]
    landmarks: NDArray[np.float32]


class _HeadSpace(Space):
    """Coordinates on a face that looks straight ahead, however the head is turned."""

    def __init__(self, canvas: Canvas, geometry: Geometry) -> None:
        self.geometry: Geometry | None = None
        super().__init__(canvas, geometry.head)
        if geometry.turned:
            columns, rows = self.reach(*HEAD_REACH)
            where = (slice(None), rows, columns)
            self.x[where], self.y[where] = geometry.unturn(self.x[where], self.y[where])
            self.geometry = geometry

    def reach(self, x0: float, y0: float, x1: float, y1: float) -> tuple[slice, slice]:
        import numpy as np

        if self.geometry is None:
            return super().reach(x0, y0, x1, y1)
        # A turned box is no box: its corners and the middles between them bound it well enough.
        across, down = np.meshgrid(np.linspace(x0, x1, 5), np.linspace(y0, y1, 5))
        frame = np.arange(len(self.placement.scale))[:, None].repeat(25, axis=1)
        u = across.reshape(1, -1).astype(np.float32).repeat(len(frame), axis=0)
        v = down.reshape(1, -1).astype(np.float32).repeat(len(frame), axis=0)
        px, py = self.placement.forward(*self.geometry.turn(u, v, frame), frame)
        return self._pixels(px), self._pixels(py)


class _FaceSpace(Space):
    """The same with the mouth closed. opening: float32 [F, H, W], depth inside the open mouth."""

    def __init__(self, head: _HeadSpace, geometry: Geometry) -> None:
        import numpy as np

        self.canvas, self.placement, self._head = head.canvas, head.placement, head
        self.x, self.y = head.x, head.y
        self.opening = np.full_like(head.y, -1)
        if geometry.talks:
            columns, rows = self.reach(-1.1, MOUTH_Y - 0.2, 1.1, MOUTH_Y + 1.7)
            where = (slice(None), rows, columns)
            self.y = head.y.copy()
            self.y[where], self.opening[where] = geometry.lift_jaw(head.x[where], head.y[where])

    def reach(self, x0: float, y0: float, x1: float, y1: float) -> tuple[slice, slice]:
        # A dropped jaw reaches further down.
        return self._head.reach(x0, y0, x1, y1 + (0.15 if self.y is not self._head.y else 0))


def render(
    identity: Identity, scene: Scene, poses: Poses, size: int, arm_side: int, *, flow: bool
) -> Rendering:
    """`size` x `size` pixels; arm_side: -1 or 1, the side of the arm that waves."""
    import numpy as np

    geometry = Geometry(identity, scene, poses, size, arm_side)
    canvas = Canvas(len(poses), size)
    wall, body = Space(canvas, geometry.wall), Space(canvas, geometry.body)
    head = _HeadSpace(canvas, geometry)
    face = _FaceSpace(head, geometry)
    draw_wall(wall, body, scene)
    draw_back_hair(head, identity)
    draw_body(body, geometry, identity, scene)
    draw_face(head, face, geometry, identity, face.opening)
    draw_glasses(head, identity)
    draw_front_hair(head, identity)
    draw_hat(head, identity)
    spaces: dict[Part, Space] = {
        Part.WALL: wall, Part.BODY: body, Part.HEAD: head, Part.FACE: face, Part.MOUTH: head, Part.LID: head
    }  # fmt: skip
    if geometry.waves:
        arm = Space(canvas, geometry.arm)
        draw_arm(arm, geometry, identity, scene)
        spaces[Part.ARM] = arm
    moved = _flow(canvas, spaces, geometry) if flow else np.zeros((0, size, size, 2), dtype=np.float32)
    return Rendering(canvas.frames(), canvas.parts, moved, _landmarks(geometry, identity))


def _flow(canvas: Canvas, spaces: dict[Part, Space], geometry: Geometry) -> NDArray[np.float32]:
    """Where each pixel's place on its part goes on the next frame, less where it is."""
    import numpy as np

    frames, size = canvas.parts.shape[0], canvas.size
    flow = np.zeros((max(0, frames - 1), size, size, 2), dtype=np.float32)
    for part, space in spaces.items():
        frame, row, column = np.nonzero(canvas.parts[:-1] == part)
        x, y = space.x[frame, row, column], space.y[frame, row, column]
        after = frame + 1
        if part == Part.LID:
            y = geometry.move_lid(x, y, frame)
        elif part == Part.FACE:
            y = geometry.drop_jaw(x, y, after)
        if part in (Part.HEAD, Part.FACE, Part.MOUTH, Part.LID):
            x, y = geometry.turn(x, y, after)
        px, py = space.placement.forward(x, y, after)
        flow[frame, row, column, 0] = px - (column + np.float32(0.5))
        flow[frame, row, column, 1] = py - (row + np.float32(0.5))
    return flow


def _landmarks(geometry: Geometry, identity: Identity) -> NDArray[np.float32]:
    """Eyes, nose tip and mouth corners on each frame, left ones (seen in the image) first."""
    import numpy as np

    corner = identity.mouth_width
    corner_y = MOUTH_Y - 0.6 * identity.smile
    places = np.array(
        [
            (-identity.eye_spacing, EYE_Y), (identity.eye_spacing, EYE_Y), (0.0, identity.nose_length - 0.06),
            (-corner, corner_y), (corner, corner_y),
        ],
        dtype=np.float32,
    )  # fmt: skip
    frame = np.arange(geometry.frames)[:, None].repeat(5, axis=1)
    u = places[None, :, 0].repeat(geometry.frames, axis=0)
    v = places[None, :, 1].repeat(geometry.frames, axis=0)
    px, py = geometry.head.forward(*geometry.turn(u, v, frame), frame)
    return np.stack([px, py], axis=-1).astype(np.float32)
