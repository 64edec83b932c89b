"""The published form and ours give the same latents; only the work differs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from proteus_deploy.benchmarks.ceilings import denoiser_flops
from proteus_deploy.benchmarks.denoising_loop import LoopInputs, VideoSize, run_loop
from proteus_deploy.benchmarks.sizes import SIZES, open_size
from proteus_deploy.checkpoint import Checkpoint
from proteus_deploy.errors import InputError
from proteus_deploy.policies.plan import Plan
from proteus_deploy.policies.step_cache import EasyCache
from proteus_deploy.runtime.eager import EagerBackend
from proteus_deploy.stages import sample_inputs
from proteus_deploy.testing import Tolerance, assert_close

SAME = Tolerance(1e-5, "relative", "float32 rounding: folded products, and timesteps in one batch")
STEPS = 4


class Counting(EagerBackend):
    """Counts how often each graph runs."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.calls: Counter[str] = Counter()

    def runner(self, graph: str) -> Any:
        run = super().runner(graph)

        def counted(**inputs: Any) -> Any:
            self.calls[graph] += 1
            return run(**inputs)

        return counted


def loop(folder: Path, *, folded: bool, **how: Any) -> tuple[torch.Tensor, Counter[str]]:
    checkpoint = Checkpoint.open(folder)
    config = checkpoint.transformer
    backend = Counting(checkpoint, folded=folded)
    inputs = LoopInputs.make(config, VideoSize.of(config), image_tokens=backend.table.axes["M"].opt)
    return run_loop(config, checkpoint.scheduler, backend, inputs, steps=STEPS, **how), backend.calls


def test_published_and_exact_are_the_same_video(tiny_checkpoint: Path) -> None:
    published, repeated = loop(tiny_checkpoint, folded=False, published=True)
    exact, once = loop(tiny_checkpoint, folded=True)
    assert_close("latents", exact, published, SAME)
    assert once == {"identity_fusion": 1, "identity_schedule": 1, "denoiser": STEPS}
    assert repeated == {"identity_fusion": STEPS, "identity_schedule": STEPS, "denoiser": STEPS}


def test_a_plan_leaves_steps_out(tiny_checkpoint: Path) -> None:
    exact, _ = loop(tiny_checkpoint, folded=True)
    plan = Plan(step_cache=EasyCache(threshold=1e9, warmup=2, last=1))
    planned, calls = loop(tiny_checkpoint, folded=True, plan=plan)
    assert calls["denoiser"] == 3
    assert not torch.equal(exact, planned)


def test_flops_of_a_denoiser(tiny_checkpoint: Path) -> None:
    """Twice the batch is twice the work, up to what the identity's own products cost once."""
    checkpoint = Checkpoint.open(tiny_checkpoint)
    table = EagerBackend(checkpoint).table
    graph = table.graph("denoiser")
    one, two = (
        denoiser_flops(checkpoint, sample_inputs(graph, table.sizes("opt") | {"B": batch}))
        for batch in (1, 2)
    )
    assert one < two <= 2 * one
    backbone = checkpoint.transformer.backbone
    sizes = table.sizes("opt")
    tokens = sizes["L"] + sizes["f"] * sizes["y"] * sizes["x"]
    width = backbone.width
    blocks = backbone.num_layers * 2 * tokens * (12 * width**2 + 2 * tokens * width)
    assert blocks < one < 3 * blocks


def test_sizes(tmp_path: Path) -> None:
    mini = open_size("mini", tmp_path)
    backbone = mini.transformer.backbone
    assert (backbone.num_layers, backbone.num_attention_heads, backbone.attention_head_dim) == (8, 12, 64)
    size = VideoSize.of(mini.transformer)
    assert size == VideoSize(17, 256, 256)
    assert 5 * (size.height // 16) * (size.width // 16) == 1280
    published = open_size("5b", tmp_path).transformer
    assert (published.backbone.num_layers, VideoSize.of(published)) == (42, VideoSize(49, 480, 720))
    assert open_size("tiny", tmp_path).random_weights_seed is None
    with pytest.raises(InputError, match=r"size 'big' is unknown; choose from tiny, mini, 5b"):
        open_size("big", tmp_path)
    assert SIZES == ("tiny", "mini", "5b")
