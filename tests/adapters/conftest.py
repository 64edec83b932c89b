"""Adapters of the parity checkpoint's denoiser, a control network, and bundles with room for them."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from proteus_deploy.checkpoint import Checkpoint

RANK = 8  # that the bundle has room for


@pytest.fixture(scope="session")
def make_adapter() -> Callable[..., Any]:
    """make_adapter(seed, rank, modules=..., blocks=4, width=96, **fields) -> an Adapter of random factors."""
    import torch

    from proteus_deploy.adapters import Adapter
    from proteus_deploy.adapters.adapter import Factors
    from proteus_deploy.model.low_rank import PROJECTIONS

    def make(
        seed: int = 0,
        rank: int = 3,
        *,
        modules: tuple[str, ...] = PROJECTIONS,
        blocks: int = 4,
        width: int = 96,
        **fields: Any,
    ) -> Adapter:
        generator = torch.Generator().manual_seed(seed)

        def factor(*shape: int) -> torch.Tensor:
            return 0.3 * torch.randn(shape, generator=generator)

        factors = {
            f"transformer_blocks.{block}.attn1.{module}": Factors(factor(rank, width), factor(width, rank))
            for block in range(blocks)
            for module in modules
        }
        return Adapter(factors, **fields)

    return make


@pytest.fixture(scope="session")
def adapter_bundle(parity: Path, parity_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The parity checkpoint with room for adapters of rank 8, two videos at once, exported once."""
    from proteus_deploy.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(parity / "checkpoint")
    return _export(checkpoint, parity_bundle, "adapters", tmp_path_factory, max_videos=2)


@pytest.fixture(scope="session")
def controlnet(parity: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A control network of random weights for the parity checkpoint."""
    from proteus_deploy.tiny.controlnet import write_tiny_controlnet

    folder = tmp_path_factory.mktemp("control") / "controlnet"
    return write_tiny_controlnet(folder, parity / "checkpoint", heads=2)


@pytest.fixture(scope="session")
def control_bundle(
    parity: Path, controlnet: Path, parity_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The parity checkpoint with the control network and room for adapters of rank 8, exported once."""
    from proteus_deploy.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(parity / "checkpoint", controlnet=controlnet)
    return _export(checkpoint, parity_bundle, "control", tmp_path_factory)


def _export(
    checkpoint: Checkpoint,
    parity_bundle: Path,
    name: str,
    tmp_path_factory: pytest.TempPathFactory,
    *,
    max_videos: int = 1,
) -> Path:
    """Only the denoiser and what `parity_bundle` lacks is traced: other contracts differ in ranges only."""
    import shutil

    from proteus_deploy.bundle import Bundle
    from proteus_deploy.export import export
    from proteus_deploy.export.onnx_graph import ExportedGraph, export_graph
    from proteus_deploy.stage_table import ExportRanges

    bundle = Bundle.open(parity_bundle)

    def take(graph: Any, table: Any, network: Any, destination: Path, **rest: Any) -> ExportedGraph:
        if graph.name == "denoiser" or graph.name not in bundle.manifest["graphs"]:
            return export_graph(graph, table, network, destination, **rest)
        shutil.copyfile(bundle.onnx_file(graph.name), destination)
        record = bundle.manifest["graphs"][graph.name]
        return ExportedGraph((destination.name,), record["opset"], record["operators"], 0)

    base = tmp_path_factory.getbasetemp()
    root = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = root / f"bundle-{name}"
    with (root / f"{folder.name}.lock").open("w") as lock, pytest.MonkeyPatch.context() as patch:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():  # it comes by one rename, so it is whole
            patch.setattr(export, "export_graph", take)
            ranges = ExportRanges(max_videos=max_videos, max_lora_rank=RANK)
            export.export_bundle(checkpoint, folder, ranges=ranges)
    return folder
