"""The networks that gradients pass through, from a checkpoint or out of a bundle's own graphs.

A bundle keeps the denoiser's and the decoder's weights in its ONNX files under their published names, so an
adapter can be trained on the very weights that it will be served with. Everything else of a bundle (text
encoder, identity, VAE encoder) runs as it is, without gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from proteus_deploy.adapters.inputs import check_room
from proteus_deploy.errors import BundleError, InputError
from proteus_deploy.model.networks import (
    Network,
    VaeDecoderChunk,
    cache_layout,
    transformer_networks,
    vae_on_meta,
)
from proteus_deploy.model.transformer import Denoiser
from proteus_deploy.network_factory import NetworkFactory
from proteus_deploy.onnx_weights import OnnxWeights
from proteus_deploy.runtime.eager import EagerGraph, resolve_device
from proteus_deploy.stage_calls import Stage
from proteus_deploy.stage_table import ExportRanges, build_stage_table
from proteus_deploy.weights import check_keys

if TYPE_CHECKING:
    from proteus_deploy.bundle import Bundle
    from proteus_deploy.checkpoint import Checkpoint
    from proteus_deploy.runtime.backend import Backend, Runner
    from proteus_deploy.stages import StageTable

__all__ = ["DifferentiableBackend"]

_MOST_VIDEOS = 64


class DifferentiableBackend:
    """Networks in PyTorch that gradients pass through; their weights take none.

    gradient_checkpointing: activations inside blocks of the denoiser and the decoder are computed again on
    the way back, for a third more time and a small part of the memory.
    """

    name = "differentiable"
    checks_ranges = False

    def __init__(
        self,
        table: StageTable,
        network: Callable[[str], Network],
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        gradient_checkpointing: bool = False,
        others: Backend | None = None,
    ) -> None:
        """network: makes that of a graph. others: runs every graph but denoiser and decoder, where given."""
        self.table, self.device, self.dtype = table, resolve_device(device), dtype
        self._network, self._others = network, others
        self._gradient_checkpointing = gradient_checkpointing
        self._graphs: dict[str, EagerGraph] = {}

    @classmethod
    def of_checkpoint(cls, checkpoint: Checkpoint, **options: Any) -> Self:
        """options: device, dtype, gradient_checkpointing."""
        table = build_stage_table(checkpoint, ExportRanges(max_videos=_MOST_VIDEOS), optional_adapters=True)
        return cls(table, NetworkFactory(checkpoint), **options)

    @classmethod
    def of_bundle(cls, bundle: Bundle, others: Backend, **options: Any) -> Self:
        """others: an opened backend of the bundle. options: as above; the table is the bundle's own.

        Raises AdapterError for a bundle without room for adapters, BundleError for a quantised one: its
        weights are no longer the network's.
        """
        check_room(bundle.table, bundle.transformer.backbone)
        quantised = [name for name, one in bundle.manifest["graphs"].items() if one.get("quantization")]
        if quantised:
            raise BundleError(
                f"{bundle.folder} is quantised ({', '.join(sorted(quantised))}), and rounded weights give no "
                "gradients; train on the checkpoint or a bundle without --quantize: the adapter runs on both"
            )
        if "controlnet" in bundle.table.stages:
            raise BundleError(
                f"{bundle.folder} has a control network, which nothing here trains with; train on the "
                "checkpoint or a bundle without --controlnet: the adapter runs on both"
            )
        return cls(bundle.table, partial(_bundle_network, bundle), others=others, **options)

    def runner(self, graph: str) -> Runner:
        """Its weights are read on first use."""
        if self._others is not None and not _carries_gradients(graph):
            return partial(self._run_elsewhere, Stage(graph, self._others))
        if graph not in self._graphs:
            with torch.inference_mode(False):
                module = self._network(graph).materialise(self.dtype, self.device)
            if self._gradient_checkpointing:
                _recompute_blocks(module)
            self._graphs[graph] = EagerGraph(self.table.graph(graph), module)
        return self._graphs[graph].run

    def _run_elsewhere(self, stage: Stage, **inputs: Tensor) -> dict[str, Tensor]:
        """A stage of another precision and device, between tensors of ours."""
        outputs = stage(**inputs).items()
        return {
            name: value.to(self.device, self.dtype if value.is_floating_point() else None)
            for name, value in outputs
        }

    def release(self, graph: str) -> None:
        self._graphs.pop(graph, None)
        if self._others is not None:
            self._others.release(graph)

    def release_what_carries_no_gradients(self) -> None:
        """Text encoder, identity networks and VAE encoder: nothing after a loop's start needs them."""
        for graph in self.table.graphs:
            if not _carries_gradients(graph.name):
                self.release(graph.name)

    def close(self) -> None:
        self._graphs.clear()
        if self._others is not None:
            self._others.close()


def _carries_gradients(graph: str) -> bool:
    return graph == "denoiser" or graph.startswith("vae_decoder")


def _bundle_network(bundle: Bundle, graph: str) -> Network:
    if graph == "denoiser":
        module = transformer_networks(bundle.transformer, folded=False)[graph]
    elif graph.startswith("vae_decoder"):
        config = bundle.config("vae")
        vae = vae_on_meta(config)
        paths = tuple(path for path, _ in cache_layout(vae, config["latent_channels"]))
        module = VaeDecoderChunk(vae, paths, first=graph != "vae_decoder_next")
    else:
        raise InputError(f"{graph} runs on the bundle's own backend; pass one as `others`")
    shapes = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    weights = OnnxWeights(bundle.onnx_file(graph), shapes)
    check_keys(shapes, weights)
    return Network(module, graph, str, weights)


def _recompute_blocks(module: nn.Module) -> None:
    """Blocks of the denoiser, or stages of the decoder, keep no activations."""
    again = partial(recompute, use_reentrant=False)
    if isinstance(module, VaeDecoderChunk):
        decoder: Any = module.decoder  # diffusers' own switch: its stages take caches
        decoder.gradient_checkpointing = True
        decoder._gradient_checkpointing_func = again  # noqa: SLF001 - as diffusers sets it
    elif isinstance(module, Denoiser):
        for block in module.transformer_blocks:
            block.forward = partial(again, block.forward)
