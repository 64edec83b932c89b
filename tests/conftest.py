"""Shared fixtures: the same random numbers in every test, GPU tests skipped, small checkpoints."""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from torch import Tensor

    from proteus_deploy import GenerateRequest, IdentityFeatures, Pipeline

# Tensors in tests are tiny: a second thread only waits, and on a busy machine for ten times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Derandomized and without a database: a test fails for everyone or for nobody. No deadline: timings on a
# busy machine say nothing about the code.
settings.register_profile("proteus", derandomize=True, database=None, deadline=None)
settings.load_profile("proteus")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where torch sees no CUDA device."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if torch.cuda.is_available():
        return
    reason = f"needs a CUDA device; torch {torch.__version__} sees none on this machine"
    for item in marked:
        item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    """Seed every generator in use; torch and numpy only where a test has loaded them."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the working tree that is being tested."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete checkpoint in the published layout, made from seed 0. Read it, don't write into it."""
    from proteus_deploy.tiny.checkpoint import write_tiny_checkpoint

    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint")


@pytest.fixture(scope="session")
def parity() -> Path:
    """A miniature published checkpoint and three recorded runs of the published pipeline; see its README."""
    return Path(__file__).parent / "data" / "parity"


@pytest.fixture(scope="session")
def parity_bundle(parity: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The parity checkpoint as a float32 bundle, exported once. Read it, don't write into it."""
    return _export(parity / "checkpoint", "parity", tmp_path_factory)


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint as a float32 bundle, exported once. Read it, don't write into it."""
    return _export(tiny_checkpoint, "tiny", tmp_path_factory)


@pytest.fixture(scope="session")
def triton_client(repository: Path) -> Path:
    """An interpreter with `tritonclient`, which doesn't go with our protobuf; made once, in build/."""
    from proteus_deploy.benchmarks.triton_environments import NotInstallable, client_environment

    try:
        return client_environment(repository / "build" / "triton" / "client")
    except NotInstallable as error:
        pytest.skip(str(error))


@pytest.fixture
def instant_export(parity_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports of the parity checkpoint in float32 take their graphs from `parity_bundle`."""
    import shutil

    from proteus_deploy.bundle import Bundle
    from proteus_deploy.export import export
    from proteus_deploy.export.onnx_graph import ExportedGraph

    bundle = Bundle.open(parity_bundle)

    def take(graph: Any, table: Any, network: Any, destination: Path, **_: Any) -> ExportedGraph:
        shutil.copyfile(bundle.onnx_file(graph.name), destination)
        record = bundle.manifest["graphs"][graph.name]
        return ExportedGraph((destination.name,), record["opset"], record["operators"], 0)

    monkeypatch.setattr(export, "export_graph", take)


def _export(checkpoint: Path, name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the checkpoint; of several workers (pytest-xdist) one makes it, the others wait for it."""
    import fcntl

    from proteus_deploy.checkpoint import Checkpoint
    from proteus_deploy.export.export import export_bundle

    base = tmp_path_factory.getbasetemp()
    root = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = root / f"bundle-{name}"
    with (root / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():  # it comes by one rename, so it is whole
            export_bundle(Checkpoint.open(checkpoint), folder)
    return folder


@pytest.fixture(scope="session")
def parity_pipeline(parity: Path) -> Iterator[Pipeline]:
    """The reference pipeline on the parity checkpoint, shared by tests that only run it."""
    from proteus_deploy import Pipeline

    with Pipeline.from_checkpoint(parity / "checkpoint") as pipeline:
        yield pipeline


@pytest.fixture
def identity() -> Callable[..., IdentityFeatures]:
    """identity(seed, **fields) -> random features as wide as the parity checkpoint wants them."""
    import torch

    from proteus_deploy import IdentityFeatures

    def make(seed: int = 0, **fields: Any) -> IdentityFeatures:
        generator = torch.Generator().manual_seed(seed)
        states = tuple(torch.randn(1, 10, 16, generator=generator) for _ in range(5))
        return IdentityFeatures(torch.randn(1, 1, 40, generator=generator), states, **fields)

    return make


@pytest.fixture
def small_request(parity: Path, identity: Callable[..., IdentityFeatures]) -> Callable[..., GenerateRequest]:
    """small_request(**fields) -> a request of two steps, five frames and 32 x 48 pixels."""
    from proteus_deploy import GenerateRequest

    def make(**fields: Any) -> GenerateRequest:
        defaults: dict[str, Any] = {
            "prompt": "A woman waves",
            "identity_prompt": "A woman",
            "height": 32,
            "width": 48,
            "num_frames": 5,
            "num_inference_steps": 2,
            "seed": 7,
        }
        if "photo" not in fields:
            image = parity / "case_cfg_dpm" / "reference.png"
            defaults |= {"identity": identity(), "condition_image": image}
        return GenerateRequest(**{**defaults, **fields})

    return make


@pytest.fixture
def make_checkpoint(parity: Path, tmp_path: Path) -> Callable[..., Path]:
    """make_checkpoint(name, vae={...}, **changes) -> a folder in the published layout with random weights.

    `changes` are laid over the transformer config of the parity checkpoint, and the transformer's weights
    are random numbers in the shapes that this config asks for; the other parts are the parity checkpoint's.
    """
    published = parity / "checkpoint"

    def make(name: str = "checkpoint", *, vae: dict[str, Any] | None = None, **changes: Any) -> Path:
        from proteus_deploy.model.config import read_transformer_config
        from proteus_deploy.model.networks import transformer_networks

        folder = tmp_path / name
        for part in ("text_encoder", "tokenizer", "scheduler"):
            _link(published / part, folder / part)
        _link(published / "model_index.json", folder / "model_index.json")
        _link(published / "vae" / _WEIGHTS, folder / "vae" / _WEIGHTS)
        vae_config = json.loads((published / "vae" / "config.json").read_text()) | (vae or {})
        (folder / "vae" / "config.json").write_text(json.dumps(vae_config))
        config = json.loads((published / "transformer" / "config.json").read_text()) | changes
        networks = transformer_networks(read_transformer_config(config), folded=False)
        shapes = {key: value.shape for net in networks.values() for key, value in net.state_dict().items()}
        write_transformer(folder, config, random_weights(shapes))
        return folder

    return make


_WEIGHTS = "diffusion_pytorch_model.safetensors"


def _link(target: Path, link: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(target)


def write_transformer(folder: Path, config: dict[str, Any], weights: dict[str, Tensor]) -> None:
    """Write transformer/config.json and its weights, as published."""
    from safetensors.torch import save_file

    (folder / "transformer").mkdir(exist_ok=True)
    (folder / "transformer" / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "transformer" / _WEIGHTS)


def random_weights(shapes: dict[str, Any]) -> dict[str, Tensor]:
    """Weights under which signals keep their size and every layer matters: no zeros, norms around one."""
    import zlib

    import torch

    weights = {}
    for key, shape in shapes.items():
        numbers = torch.randn(tuple(shape), generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))
        if len(shape) > 1 and not key.endswith("latents"):
            numbers /= max(shape[1:].numel(), 1) ** 0.5
        elif key.endswith("weight"):
            numbers = 1 + numbers / 10
        elif len(shape) == 1:
            numbers /= 10
        weights[key] = numbers
    return weights


@pytest.fixture(name="random_weights")
def _random_weights() -> Callable[[dict[str, Any]], dict[str, Tensor]]:
    return random_weights


@pytest.fixture(name="write_transformer")
def _write_transformer() -> Callable[[Path, dict[str, Any], dict[str, Tensor]], None]:
    return write_transformer
