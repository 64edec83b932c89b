"""What the PyTorch reference computes, recorded so that a bundle can be verified without its checkpoint.

Per graph: named inputs and outputs at the table's smallest and tuned sizes, float32.
One video: a request with ready identity features, the latents after every step, and the frames.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from proteus_deploy._files import write_json
from proteus_deploy.control import Control
from proteus_deploy.errors import BundleError
from proteus_deploy.identity.features import IdentityFeatures
from proteus_deploy.reporting import Report
from proteus_deploy.request import GenerateRequest
from proteus_deploy.stages import Graph, StageTable, sample_inputs

if TYPE_CHECKING:
    from proteus_deploy.checkpoint import Checkpoint
    from proteus_deploy.pipeline import Pipeline, ProgressEvent
    from proteus_deploy.runtime.backend import Backend

ReferenceScope = Literal["video", "stages", "none"]

SIZES: tuple[Literal["min", "opt"], ...] = ("min", "opt")
# A tile of one latent pixel leaves group norms a handful of values, so that rounding looks several times
# larger than on any real tile; the smallest recorded one has this many rows and columns.
_SMALLEST_TILE = 4
STEPS = 4
SEED = 7
_LARGEST_FRAMES = 9  # three latent frames: the first chunk of an odd count, and nothing after it
# Short, so that a small checkpoint's few tokens hold them whole.
_PROMPT = "A woman waves."
_IDENTITY_PROMPT = "woman"
_NEGATIVE_PROMPT = "blurry"


@dataclass(frozen=True)
class StageReference:
    graph: Graph
    sizes: str
    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]


@dataclass(frozen=True)
class VideoReference:
    request: GenerateRequest
    initial_latents: Tensor
    latents: tuple[Tensor, ...]
    frames: Tensor


def record_stages(table: StageTable, backend: Backend, report: Report) -> Iterator[StageReference]:
    """Run every graph of `table` on `backend` (the eager reference), one network in memory at a time."""
    for index, graph in enumerate(table.graphs):
        for which in SIZES:
            inputs = sample_inputs(graph, reference_sizes(table, which), seed=SEED)
            yield StageReference(graph, which, inputs, backend.runner(graph.name)(**inputs))
        backend.release(graph.name)
        report("reference", index + 1, len(table.graphs))


def reference_sizes(table: StageTable, which: Literal["min", "opt"]) -> dict[str, int]:
    """Symbol values that the reference is recorded with."""
    sizes = table.sizes(which)
    return {
        symbol: max(size, min(_SMALLEST_TILE, table.axes[symbol].max)) if symbol in ("h", "w") else size
        for symbol, size in sizes.items()
    }


def reference_request(table: StageTable, pipeline: Pipeline) -> tuple[GenerateRequest, Tensor]:
    """A short request at the tuned size, with identity features and a condition image from the seed."""
    config = pipeline.config
    backbone = config.backbone
    generator = torch.Generator().manual_seed(SEED)
    tokens = table.axes["M"].opt

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    states = tuple(normal(1, tokens, config.image_dim) for _ in range(5))
    identity = IdentityFeatures(normal(1, 1, config.identity_dim), states)
    opt = table.sizes("opt")
    height, width = opt["y"] * backbone.patch_size * 8, opt["x"] * backbone.patch_size * 8
    frames = backbone.sample_frames if table.axes["f"].min == table.axes["f"].max else _LARGEST_FRAMES
    coarse = torch.rand(1, 3, height // 8, width // 8, generator=generator)
    image = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic").clamp(0, 1)
    request = GenerateRequest(
        prompt=_PROMPT,
        identity_prompt=_IDENTITY_PROMPT,
        negative_prompt=_NEGATIVE_PROMPT,
        identity=identity,
        condition_image=(image[0] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy(),
        height=height,
        width=width,
        num_frames=frames,
        num_inference_steps=STEPS,
        seed=SEED,
        control=_reference_control(frames, height, width) if "controlnet" in table.stages else None,
    )
    count = -(-((frames - 1) // 4 + 1) // (backbone.patch_size_t or 1)) * (backbone.patch_size_t or 1)
    return request, normal(1, count, backbone.latent_channels, height // 8, width // 8)


def _reference_control(frames: int, height: int, width: int) -> Control:
    """Smooth colours that move, acting in all steps but the last."""
    generator = torch.Generator().manual_seed(SEED)
    coarse = torch.rand(1, 3, 2, 3, 3, generator=generator)
    moving = torch.nn.functional.interpolate(coarse, (frames, height, width), mode="trilinear")
    video = (moving[0] * 255).round().to(torch.uint8).permute(1, 2, 3, 0).contiguous()
    return Control(video.numpy(), scale=0.5, end=(STEPS - 1) / STEPS)


def record_video(table: StageTable, pipeline: Pipeline, report: Report) -> VideoReference:
    """Run the reference request on the eager pipeline."""
    request, noise = reference_request(table, pipeline)
    latents: list[Tensor] = []

    def watch(event: ProgressEvent) -> None:
        if event.phase == "denoise":
            report("reference video", event.done, event.total)

    video = pipeline.generate(
        request,
        initial_latents=noise,
        on_step=lambda event: latents.append(event.latents.float().clone()),
        on_progress=watch,
    )
    return VideoReference(request, noise, tuple(latents), video.frames)


def save_stage(folder: Path, reference: StageReference) -> None:
    from safetensors.torch import save_file

    tensors = {f"input.{name}": value.contiguous() for name, value in reference.inputs.items()}
    tensors |= {f"output.{name}": value.contiguous() for name, value in reference.outputs.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / f"{reference.graph.name}.{reference.sizes}.safetensors")


def load_stages(folder: Path, table: StageTable) -> Iterator[StageReference]:
    """Recorded stages of a bundle, in the table's order. Raises BundleError when there are none."""
    from safetensors.torch import load_file

    for graph in table.graphs:
        for which in SIZES:
            file = folder / f"{graph.name}.{which}.safetensors"
            if not file.is_file():
                raise BundleError(
                    f"{file} is absent: the bundle was exported with --reference none, so verifying it needs "
                    "the checkpoint (--checkpoint)"
                )
            tensors = load_file(file)
            inputs = {spec.name: tensors[f"input.{spec.name}"] for spec in graph.inputs}
            outputs = {spec.name: tensors[f"output.{spec.name}"] for spec in graph.outputs}
            yield StageReference(graph, which, inputs, outputs)


def save_video(folder: Path, reference: VideoReference) -> None:
    from safetensors.torch import save_file

    request = reference.request
    assert request.identity is not None
    tensors = {f"latents.{index}": value.contiguous() for index, value in enumerate(reference.latents)}
    tensors |= {
        f"hidden.{index}": state.contiguous() for index, state in enumerate(request.identity.id_vit_hidden)
    }
    tensors["id_cond"] = request.identity.id_cond
    tensors["condition_image"] = torch.from_numpy(request.condition_image).contiguous()
    tensors["initial_latents"] = reference.initial_latents.contiguous()
    if request.control is not None:
        tensors["control_video"] = torch.as_tensor(request.control.video)
    tensors["frames"] = reference.frames.contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "video.safetensors")
    write_json(folder / "video.json", request.to_json())


def load_video(folder: Path) -> VideoReference | None:
    """The recorded video of a bundle; None when the export recorded stages only."""
    import json

    from safetensors.torch import load_file

    if not (folder / "video.json").is_file():
        return None
    tensors = load_file(folder / "video.safetensors")
    fields: dict[str, Any] = json.loads((folder / "video.json").read_text())
    fields.pop("photo")
    identity = IdentityFeatures(tensors["id_cond"], tuple(tensors[f"hidden.{index}"] for index in range(5)))
    if "control" in fields:
        facts = fields["control"]
        acting = {name: facts[name] for name in ("scale", "start", "end")}
        fields["control"] = Control(tensors["control_video"].numpy(), **acting)
    request = GenerateRequest(**fields, identity=identity, condition_image=tensors["condition_image"].numpy())
    latents = tuple(tensors[f"latents.{index}"] for index in range(request.num_inference_steps))
    return VideoReference(request, tensors["initial_latents"], latents, tensors["frames"])


def eager_pipeline(checkpoint: Checkpoint) -> Pipeline:
    """The float32 reference of a checkpoint."""
    from proteus_deploy.pipeline import Pipeline
    from proteus_deploy.runtime.eager import EagerBackend

    backend = EagerBackend(checkpoint)
    return Pipeline(
        backend,
        checkpoint.transformer,
        checkpoint.vae,
        checkpoint.scheduler,
        checkpoint.tokenizer,
        checkpoint.face_encoder,
    )
