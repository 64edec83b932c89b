"""Adapters of the parity checkpoint's denoiser, and a bundle of it with room for them."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

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
    """The parity checkpoint with room for adapters of rank 8, two videos at once, exported once.

    Its denoiser alone is traced: the others' contracts differ from `parity_bundle`'s in ranges only.
    """
    import shutil

    from proteus_deploy.bundle import Bundle
    from proteus_deploy.checkpoint import Checkpoint
    from proteus_deploy.export import export
    from proteus_deploy.export.onnx_graph import ExportedGraph, export_graph
    from proteus_deploy.stage_table import ExportRanges

    bundle = Bundle.open(parity_bundle)

    def take(graph: Any, table: Any, network: Any, destination: Path, **rest: Any) -> ExportedGraph:
        if graph.name == "denoiser":
            return export_graph(graph, table, network, destination, **rest)
        shutil.copyfile(bundle.onnx_file(graph.name), destination)
        record = bundle.manifest["graphs"][graph.name]
        return ExportedGraph((destination.name,), record["opset"], record["operators"], 0)

    base = tmp_path_factory.getbasetemp()
    root = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = root / "bundle-adapters"
    with (root / "bundle-adapters.lock").open("w") as lock, pytest.MonkeyPatch.context() as patch:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():  # it comes by one rename, so it is whole
            patch.setattr(export, "export_graph", take)
            ranges = ExportRanges(max_videos=2, max_lora_rank=RANK)
            export.export_bundle(Checkpoint.open(parity / "checkpoint"), folder, ranges=ranges)
    return folder
