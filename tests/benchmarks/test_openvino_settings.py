"""Settings of OpenVINO: each can be opened, and none changes what a float32 step computes."""

from __future__ import annotations

from pathlib import Path

import pytest

from proteus_deploy.bundle import Bundle
from proteus_deploy.stages import sample_inputs
from proteus_deploy.testing import TOLERANCES, assert_close

pytest.importorskip("openvino")


def test_every_setting_computes_the_same(parity_bundle: Path) -> None:
    from proteus_deploy.benchmarks.openvino_settings import BASELINE, SETTINGS, open_step

    bundle = Bundle.open(parity_bundle)
    graph, sizes = bundle.table.graph("denoiser"), bundle.table.sizes("opt")
    inputs = sample_inputs(graph, sizes)
    steps = {name: open_step(bundle, graph, name, sizes, inputs) for name in SETTINGS}
    want = steps[BASELINE]()
    for name, step in steps.items():
        step()
        assert_close(name, step(), want, TOLERANCES["bundle", "graph", "fp32"])


def test_ratio_is_taken_within_each_round() -> None:
    """A machine that slows down half-way slows both: the ratio of medians would say something else."""
    import torch

    from proteus_deploy.benchmarks.openvino_settings import BASELINE, row_of

    busy = {BASELINE: [1.0, 4.0, 8.0], "fixed sizes": [0.5, 2.0, 16.0]}
    found = row_of("fixed sizes", [1.0, 2.0, 3.0], busy, 0.1, torch.ones(2), torch.ones(2))
    assert (found["ratio"], found["ratios"], found["error"]) == (0.5, [0.5, 2.0], 0.0)
