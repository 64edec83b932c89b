"""Trained weights in and out of the published checkpoint layout."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from proteus_deploy._files import atomic_directory
from proteus_deploy.checkpoint import Checkpoint
from proteus_deploy.model.config import TransformerConfig
from proteus_deploy.model.networks import fill_computed_buffers
from proteus_deploy.runtime.backend import resolve_dtype
from proteus_deploy.training.network import TrainableTransformer, initialise

__all__ = ["load_network", "new_network", "noise_schedule", "write_checkpoint"]

_TRANSFORMER_FILE = Path("transformer") / "diffusion_pytorch_model.safetensors"


def new_network(
    config: TransformerConfig, *, seed: int, fusion_text: bool = True, time_aware: bool = True
) -> TrainableTransformer:
    """A transformer with random weights, to be trained from nothing."""
    network = TrainableTransformer(config, fusion_text=fusion_text, time_aware=time_aware)
    return initialise(network, seed=seed)


def load_network(
    checkpoint: Checkpoint, *, fusion_text: bool = True, time_aware: bool = True
) -> TrainableTransformer:
    """The checkpoint's transformer in float32, to be trained on. Raises CheckpointError for its files."""
    network = TrainableTransformer(checkpoint.transformer, fusion_text=fusion_text, time_aware=time_aware)
    weights = checkpoint.weights("transformer")
    state = {key: weights.tensor(key).float() for key in weights.keys()}  # noqa: SIM118 - a protocol, no dict
    network.load_published(state)
    for part in network.parts():
        fill_computed_buffers(part, "cpu")
    return network


def noise_schedule(checkpoint: Checkpoint) -> Tensor:
    """alphas_cumprod float32 [1000] of the checkpoint's own scheduler."""
    import diffusers

    scheduler = getattr(diffusers, checkpoint.scheduler["_class_name"])
    alphas: Tensor = scheduler.from_config(dict(checkpoint.scheduler)).alphas_cumprod
    return alphas


def write_checkpoint(
    base: Path, state: Mapping[str, Tensor], folder: Path, *, dtype: str | torch.dtype = "float32"
) -> Path:
    """Write `folder`: everything that the checkpoint `base` has, with these weights of the transformer.

    state: {published key: tensor}. dtype: of the weights on disk. Files that stay as they are become hard
    links where the file system has them, else copies. The folder is whole or absent; an old one is replaced.
    """
    from safetensors.torch import save_file

    kind = resolve_dtype(dtype)
    with atomic_directory(folder, replace=True) as new:
        for name in _kept_files(base):
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            _link_or_copy((base / name).resolve(), new / name)
        target = new / _TRANSFORMER_FILE
        target.parent.mkdir(exist_ok=True)
        converted = {key: value.detach().to("cpu", kind).contiguous() for key, value in state.items()}
        save_file(converted, target, {"format": "pt"})
    return folder


def _kept_files(base: Path) -> Iterator[Path]:
    """Relative names of what a new checkpoint takes over: all but hidden files and the transformer's weights.

    Links to folders are followed, but for those that lead back to where they lie.
    """
    for path, folders, files in os.walk(base, followlinks=True):
        here, real = Path(path), Path(path).resolve()
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".") and not real.is_relative_to((here / name).resolve())
        ]
        inside = here.relative_to(base)
        for name in files:
            weights = inside.parts[:1] == ("transformer",) and name != "config.json"
            if not name.startswith(".") and not weights:
                yield inside / name


def _link_or_copy(file: Path, new: Path) -> None:
    # Of a file that can't be written a copy can: a folder is synced to the disk before it gets its name.
    if os.access(file, os.W_OK):
        with suppress(OSError):
            os.link(file, new)
            return
    shutil.copyfile(file, new)
