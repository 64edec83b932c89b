"""Training runs on random numbers, as a script: `python fake_run.py JSON`, once for each process.

JSON: a list of runs, {"folder", "settings", "save_every_s", "stop_after", "kind": "fsdp"}. Each writes
`folder/weights.safetensors`, the averaged weights under their published names, and the state beside it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Event
from typing import Any, cast

import torch
from torch import Tensor

from proteus_deploy.cli.video_progress import cancel_on_interrupt
from proteus_deploy.errors import Cancelled
from proteus_deploy.model.config import TransformerConfig, read_transformer_config
from proteus_deploy.tiny.checkpoint import TRANSFORMER
from proteus_deploy.training.batches import Batches
from proteus_deploy.training.data.cache import LatentDataset
from proteus_deploy.training.loop import Schedule, Trainer, make_accelerator
from proteus_deploy.training.network import TrainableTransformer
from proteus_deploy.training.settings import TrainSettings
from proteus_deploy.training.state import save_tensors

SMALL: dict[str, Any] = {
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "num_layers": 2,
    "time_embed_dim": 16,
    "text_embed_dim": 16,
    "max_text_seq_length": 8,
    "sample_frames": 9,
    "sample_height": 4,
    "sample_width": 4,
    "cross_attn_dim_head": 8,
    "cross_attn_num_heads": 2,
    "FT_clip_dim": 12,
    "FT_dim_head": 8,
    "FT_num_heads": 2,
    "FT_num_querie": 4,
    "FT_output_dim": 16,
    "FT_txt_dim": 16,
    "FT_vit_dim": 8,
    "FFE_clip_dim": 12,
    "FFE_heads": 2,
    "FFE_input_fuse_dim": 16,
    "FFE_input_img_dim": 12,
    "FFE_num_queries": 3,
    "FFE_output_dim": 20,
    "FFE_query_dim": 24,
    "FFE_time_channel": 16,
    "FFE_time_embed_dim": 18,
    "FFE_vit_dim": 8,
}
# Everything that random numbers decide is switched on.
SETTINGS: dict[str, Any] = {
    "steps": 6,
    "batch_size": 4,
    "micro_batch": 1,
    "learning_rate": 3e-3,
    "warmup": 2,
    "ema": 0.9,
    "mixed_precision": "no",
    "gradient_checkpointing": False,
    "image_dropout": 0.3,
    "text_dropout": 0.3,
    "mask_probability": 0.5,
}


def small_config(**changes: Any) -> TransformerConfig:
    """The tiny checkpoint's transformer, two layers of width 32."""
    return read_transformer_config({**TRANSFORMER, **SMALL, **changes})


def small_network(config: TransformerConfig | None = None, **ablations: bool) -> TrainableTransformer:
    """Weights under which every part matters, other than those that training from nothing starts with."""
    network = TrainableTransformer(config or small_config(), **ablations)
    weights = {}
    generator = torch.Generator().manual_seed(1)
    for key, meta in network.published_state().items():
        numbers = torch.randn(meta.shape, generator=generator)
        if meta.ndim > 1:
            numbers /= max(1, meta.shape[1:].numel()) ** 0.5
        else:
            numbers = numbers / 10 + float(key.endswith("weight"))
        weights[key] = numbers
    from proteus_deploy.model.networks import fill_computed_buffers

    network.load_published(weights)
    for part in network.parts():
        fill_computed_buffers(part, "cpu")
    return network


def random_clip(config: TransformerConfig, index: int, *, keypoints: bool = False) -> dict[str, Tensor]:
    """A clip as LatentDataset gives it: two photos with three variants; every third clip has no mask."""
    generator = torch.Generator().manual_seed(100 + index)
    backbone, fusion = config.backbone, config.fusion
    assert fusion is not None
    channels, grid = backbone.out_channels, (3, backbone.sample_height, backbone.sample_width)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def share(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    clip = {
        "latent_mean": normal(grid[0], channels, *grid[1:]),
        "latent_std": share(grid[0], channels, *grid[1:]) / 10,
        "prompt": normal(8, backbone.text_embed_dim),
        "prompt_mask": (torch.arange(8) < 2 + index % 5).float(),
        "identity": normal(5, backbone.text_embed_dim),
        "identity_mask": torch.ones(5),
        "condition": normal(2, 3, channels, *grid[1:]),
        "id_cond": normal(2, 1, fusion.identity_dim),
        "image_states": normal(2, 5, 6, fusion.image_dim),
        "heat": share(*grid),
        "head_mask": (share(*grid) > 0.5).float() * float(index % 3 > 0),
        "face_mask": (share(*grid) > 0.8).float(),
    }
    if keypoints:
        clip["keypoint_condition"] = normal(2, 3, channels, *grid[1:])
    return clip


class RandomClips:
    """Stands in for LatentDataset. Clip i is the same in every process."""

    def __init__(self, count: int = 7, config: TransformerConfig | None = None, **options: bool) -> None:
        self.clips = [random_clip(config or small_config(), index, **options) for index in range(count)]

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return dict(self.clips[index])


def make_batches(settings: TrainSettings, clips: RandomClips | None = None) -> Batches:
    """Batches of random clips under a schedule that ends in pure noise."""
    empty = torch.full((8, 16), 0.5), (torch.arange(8) < 1).float()
    alphas = torch.linspace(0.999, 0, 1000)
    return Batches(cast(LatentDataset, RandomClips() if clips is None else clips), settings, alphas, empty)


def make_trainer(folder: Path, settings: TrainSettings, **options: Any) -> Trainer:
    """A trainer on the CPU that leaves `weights.safetensors`."""

    def keep(step: int, weights: Mapping[str, Tensor]) -> None:
        save_tensors(folder / "weights.safetensors", weights, {"step": step})

    arguments: dict[str, Any] = {"on_checkpoint": keep, **options}
    if "accelerator" not in arguments:
        arguments["accelerator"] = make_accelerator(settings, device="cpu")
    return Trainer(small_network(), make_batches(settings), settings, folder, **arguments)


def become_fsdp(settings: TrainSettings) -> Any:
    """accelerate takes FSDP on GPUs only; told afterwards, it shards over two CPU processes as well."""
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    accelerator = make_accelerator(settings, device="cpu")

    AcceleratorState._shared_state["distributed_type"] = DistributedType.FSDP
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Block"],
        cpu_ram_efficient_loading=False,
        reshard_after_forward=True,
    )
    AcceleratorState._shared_state["fsdp_plugin"] = plugin
    return accelerator


def run(document: Mapping[str, Any]) -> None:
    """One run as the document says. Raises KeyboardInterrupt when interrupted, Cancelled by `stop_after`."""
    settings = TrainSettings(**{**SETTINGS, **document.get("settings", {})})
    options: dict[str, Any] = {"schedule": Schedule(1, save_every_s=document.get("save_every_s", 0))}
    if document.get("kind") == "fsdp":
        options["accelerator"] = become_fsdp(settings)
    trainer = make_trainer(Path(document["folder"]), settings, **options)
    sharded = all(hasattr(parameter, "full_tensor") for parameter in trainer.parameters.values())
    assert sharded == ("accelerator" in options), "FSDP was asked for and not used"
    with cancel_on_interrupt() as cancel:
        # What one process is asked, all have to do.
        asked = Event() if trainer.accelerator.process_index else cancel

        def report(phase: str, done: int, total: int) -> None:
            if done == document.get("stop_after"):
                asked.set()
            if trainer.accelerator.is_main_process:
                print(phase, done, total, flush=True)  # noqa: T201

        try:
            trainer.train(report=report, cancel=asked)
        except Cancelled as error:
            if document.get("stop_after") is None:
                raise
            print(error)  # noqa: T201


def main(documents: Sequence[Mapping[str, Any]]) -> int:
    """All runs; exit code 130 when interrupted, as the command has it."""
    try:
        for document in documents:
            run(document)
    except KeyboardInterrupt:
        return 130
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(json.loads(sys.argv[1])))
