"""Motion on the person and on the background, in pixels at a stated size."""

from __future__ import annotations

import numpy as np
import pytest

from proteus_deploy.errors import InputError
from proteus_deploy.evaluate.motion import estimate_flow, mean_motion
from proteus_deploy.optical_flow import DisFlow
from proteus_deploy.testing import Tolerance, assert_close
from proteus_deploy.training.avatars import make_clip

EXACT = Tolerance(1e-6, "relative", "float32 flow, averaged in float64")


def test_the_length_counts_and_opposite_directions_do_not_cancel() -> None:
    """OpenS2V averages signed components, so that a head shaken to and fro hardly moves."""
    flow = np.zeros((2, 480, 720, 2), np.float32)
    flow[0], flow[1] = (3, 4), (-3, -4)
    assert mean_motion(flow) == 5.0


@pytest.mark.parametrize(("height", "width", "factor"), [(480, 720, 1.0), (96, 96, 5.0), (960, 1440, 0.5)])
def test_sizes_are_brought_to_480_pixels_of_height(height: int, width: int, factor: float) -> None:
    flow = np.full((1, height, width, 2), (0, 2), np.float32)
    assert_close("motion", mean_motion(flow), 2 * factor, EXACT)
    assert_close("at 96", mean_motion(flow, height=96), 2 * factor / 5, EXACT)


def test_person_and_background_are_apart_and_the_last_mask_is_not_used() -> None:
    flow = np.zeros((2, 480, 10, 2), np.float32)
    flow[0, :, :4, 0] = 6
    flow[1, :, :2, 0] = 9
    flow[:, :, 5:, 1] = 1
    mask = np.zeros((3, 480, 10), bool)
    mask[0, :, :4] = True
    mask[1, :, :2] = True
    # Every pixel weighs the same: four columns at 6 and two at 9.
    assert_close("person", mean_motion(flow, mask), 7.0, EXACT)
    assert_close("background", mean_motion(flow, ~mask), 10 / 14, EXACT)
    mask[2] = True
    assert_close("person", mean_motion(flow, mask), 7.0, EXACT)
    assert_close("without the last plane", mean_motion(flow, mask[:2]), 7.0, EXACT)


def test_nobody_in_the_mask_has_no_motion_and_not_0() -> None:
    flow = np.ones((1, 24, 24, 2), np.float32)
    mask = np.zeros((2, 24, 24), bool)
    mask[1] = True
    assert mean_motion(flow, mask) is None
    for wrong in (mask[:, :12], mask.astype(np.uint8), np.repeat(mask, 2, axis=0)):
        with pytest.raises(InputError, match=r"expected bool \[2, 24, 24\]"):
            mean_motion(flow, wrong)  # type: ignore[arg-type]


def test_a_waving_person_moves_before_a_still_wall() -> None:
    """By the true flow of a drawn clip, and by DIS's estimate, which smears some of it over the wall."""
    clip = make_clip(0, 0, motion="wave", num_frames=4, size=64)
    for flow in (clip.flow, estimate_flow(clip.frames, DisFlow())):
        person, wall = mean_motion(flow, clip.person_mask), mean_motion(flow, ~clip.person_mask)
        assert person is not None
        assert wall is not None
        assert person > wall
    assert mean_motion(clip.flow, ~clip.person_mask) == 0.0


def test_an_estimator_that_gives_something_else_is_refused() -> None:
    frames = np.zeros((3, 16, 20, 3), np.uint8)
    for wrong in (np.zeros((3, 16, 20, 2)), np.zeros((2, 2, 16, 20)), np.full((2, 16, 20, 2), np.nan)):
        with pytest.raises(InputError, match=r"expected \[2, 16, 20, 2\]"):
            estimate_flow(frames, lambda _frames, wrong=wrong: wrong)
    with pytest.raises(InputError, match="one frame"):
        estimate_flow(frames[:1], DisFlow())
