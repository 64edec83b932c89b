"""Curves: which sizes are measured, and that each is the size it says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from proteus_deploy.benchmarks import denoising_loop, opened_candidate
from proteus_deploy.benchmarks.bench import BenchSettings
from proteus_deploy.benchmarks.candidates import parse_candidate
from proteus_deploy.benchmarks.denoising_loop import LoopInputs, VideoSize, run_loop
from proteus_deploy.benchmarks.scaling import Scale, default_values, run_scale
from proteus_deploy.benchmarks.sizes import open_size, resized
from proteus_deploy.checkpoint import Checkpoint
from proteus_deploy.errors import InputError
from proteus_deploy.runtime.eager import EagerBackend
from proteus_deploy.testing import Tolerance, assert_close

CANDIDATES = [parse_candidate("published:eager:fp32"), parse_candidate("exact:eager:fp32")]


@pytest.mark.usefixtures("small_copies")
@pytest.mark.parametrize(
    ("axis", "values", "places", "shapes"),
    [
        ("frames", ("5", "9"), [5, 9], [(1, 2), (1, 3)]),
        ("steps", ("1", "2"), [1, 2], [(1, 5), (1, 5)]),
        ("batch", ("1", "3"), [1, 3], [(1, 5), (3, 5)]),
    ],
)
def test_rows_say_the_size_that_was_run(
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    axis: Any,
    values: tuple[str, ...],
    places: list[int],
    shapes: list[tuple[int, int]],
) -> None:
    seen: list[tuple[tuple[int, int], int]] = []
    measured = denoising_loop.run_loop

    def note(*arguments: Any, **named: Any) -> torch.Tensor:
        latents = measured(*arguments, **named)
        seen.append(((latents.shape[0], latents.shape[1]), named["steps"]))
        return latents

    monkeypatch.setattr(opened_candidate, "run_loop", note)
    settings = BenchSettings("small", steps=2, rounds=1)
    document = run_scale(
        Checkpoint.open(tiny_checkpoint), None, CANDIDATES, settings, Scale(axis, values), tmp_path
    )
    rows = document["rows"]
    assert [row["curve"]["x"] for row in rows] == [place for place in places for _ in CANDIDATES]
    assert all(row["status"] == "ok" and "peak_memory_bytes" not in row for row in rows)
    timed = seen[len(CANDIDATES) :: 2 * len(CANDIDATES)]  # the first of each size, after the warm-ups
    assert [shape for shape, _ in timed] == shapes
    assert [steps for _, steps in timed] == (places if axis == "steps" else [2, 2])
    flops = [ceilings["flops_of_a_step"] for ceilings in document["ceilings"].values()]
    assert (flops[0] < flops[1]) == (axis != "steps")
    assert document["settings"]["scale"]["values"] == list(values)


def test_videos_at_once_are_each_what_they_are_alone(tiny_checkpoint: Path) -> None:
    """Of one person; the second row's noise, image and text decide it."""
    checkpoint = Checkpoint.open(tiny_checkpoint)
    config = checkpoint.transformer
    backend = EagerBackend(checkpoint, folded=True)
    two = LoopInputs.make(config, VideoSize.of(config), image_tokens=10, videos=2)
    assert two.rows == 4
    alone = LoopInputs(two.identity, two.identity_text, two.text[1::2], two.image[1::2], two.noise[1:])
    scheduler = {**checkpoint.scheduler, "_class_name": "CogVideoXDDIMScheduler"}  # draws no noise
    both = run_loop(config, scheduler, backend, two, steps=2)
    one = run_loop(config, scheduler, backend, alone, steps=2)
    assert_close("latents", both[1:], one, Tolerance(1e-5, "relative", "float32 rounding in another batch"))


def test_random_weights_get_a_position_table_of_the_size(tmp_path: Path) -> None:
    mini = open_size("mini", tmp_path)
    larger = resized(mini, VideoSize(9, 128, 192), tmp_path)
    assert VideoSize.of(larger.transformer) == VideoSize(9, 128, 192)
    assert larger.transformer.backbone.learned_positions
    assert larger.random_weights_seed == mini.random_weights_seed
    assert larger.transformer.backbone.num_layers == mini.transformer.backbone.num_layers
    assert resized(mini, VideoSize.of(mini.transformer), tmp_path) is mini


def test_a_trained_position_table_serves_one_size(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_checkpoint(use_learned_positional_embeddings=True, use_rotary_positional_embeddings=True)
    checkpoint = Checkpoint.open(folder)
    with pytest.raises(InputError, match=r"has a position table for .* only; scale over steps or batch"):
        run_scale(checkpoint, None, CANDIDATES, BenchSettings("own"), Scale("frames", ("33",)), tmp_path)


def test_default_values(tmp_path: Path) -> None:
    mini = open_size("mini", tmp_path).transformer
    assert default_values("frames", mini, 50) == ("9", "17", "33")
    assert default_values("resolution", mini, 50) == ("128x128", "192x192", "256x256")
    assert default_values("steps", mini, 50) == ("10", "25", "50")
    assert default_values("batch", mini, 50) == ("1", "2", "4")
    published = open_size("5b", tmp_path).transformer
    assert default_values("resolution", published, 50)[-1] == "480x720"
