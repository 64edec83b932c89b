"""One torch module per graph of the stage table, built without weights, and filled on demand.

The same builders serve the eager reference (all weights read), the exporter (weights read one at a
time while the file is written) and the random real-size model (weights made up while read).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from proteus_deploy.kernels.joint_attention import attention_with
from proteus_deploy.model.config import LocalFacialConfig, TransformerConfig
from proteus_deploy.model.fused_block import FusedBlock
from proteus_deploy.model.identity_attention import IdentityForm
from proteus_deploy.model.identity_fusion import IdentityFusion
from proteus_deploy.model.identity_schedule import IdentitySchedule, LocalFacialExtractor
from proteus_deploy.model.transformer import Block, ControlledDenoiser, Denoiser
from proteus_deploy.weights import WeightSource, read_all

Kernels = Literal["reference", "triton"]


class TextEncoder(nn.Module):
    """T5 encoder as published: no attention mask, so padding tokens attend too."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        from transformers import T5Config, T5EncoderModel

        self.t5 = T5EncoderModel(T5Config(**config))

    def forward(self, input_ids: Tensor) -> Tensor:
        """[B, L] int64 -> [B, L, d_text]."""
        return self.t5(input_ids=input_ids, attention_mask=torch.ones_like(input_ids)).last_hidden_state  # type: ignore[no-any-return]


class VaeEncoder(nn.Module):
    """One image -> the moments of its latent distribution."""

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.encoder = vae.encoder
        self.quant_conv = vae.quant_conv

    def forward(self, image: Tensor) -> Tensor:
        """[1, 3, H, W] in [-1, 1] -> [1, 2*C, H/8, W/8]: mean, then log variance."""
        moments, _ = self.encoder(image.unsqueeze(2))  # type: ignore[operator]
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)  # type: ignore[operator]
        return moments.squeeze(2)  # type: ignore[no-any-return]


class VaeDecoderChunk(nn.Module):
    """A run of latent frames -> video frames, with every causal convolution's cache explicit.

    A whole decode can't be one graph: its loop over frame groups would be unrolled at the example's
    length. Group norms see one chunk at a time, so the chunks are the published ones: the first takes
    3 latent frames of an odd count (or 2 of an even one), each further one 2.
    """

    def __init__(self, vae: nn.Module, cache_paths: tuple[tuple[str, ...], ...], *, first: bool) -> None:
        super().__init__()
        self.decoder = vae.decoder
        self.post_quant_conv = vae.post_quant_conv
        self.cache_paths = cache_paths
        self.first = first

    def forward(self, latents: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
        """latents [1, C, k, h, w], divided by the scaling factor -> frames [1, 3, F, 8h, 8w], caches."""
        if self.post_quant_conv is not None:
            latents = self.post_quant_conv(latents)  # type: ignore[operator]
        nested = None if self.first else _nest(self.cache_paths, caches)
        frames, updated = self.decoder(latents, conv_cache=nested)  # type: ignore[operator]
        return frames, *(_lookup(updated, path) for path in self.cache_paths)


def _nest(paths: tuple[tuple[str, ...], ...], tensors: tuple[Tensor, ...]) -> dict[str, Any]:
    root: dict[str, Any] = {}
    for path, tensor in zip(paths, tensors, strict=True):
        node = root
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = tensor
    return root


def _lookup(tree: Mapping[str, Any], path: tuple[str, ...]) -> Tensor:
    node: Any = tree
    for key in path:
        node = node[key]
    return node  # type: ignore[no-any-return]


def cache_layout(vae: nn.Module, latent_channels: int) -> tuple[tuple[tuple[str, ...], tuple[int, ...]], ...]:
    """((path, shape at h = w = 1), ...) of each cache that a convolution reads, in the decoder's order.

    `vae` is on the meta device: only shapes are computed. Convolutions with a kernel of one frame
    return their whole input as a "cache" and never read it; those are left out.
    """
    latents = torch.empty(1, latent_channels, 3, 1, 1, device="meta")
    _, caches = vae.decoder(latents)  # type: ignore[operator]
    return tuple(_cache_leaves(caches, ()))


def _cache_leaves(tree: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], tuple[int, ...]]]:
    if isinstance(tree, Tensor):
        if path[-1] not in ("conv_y", "conv_b"):
            yield path, tuple(tree.shape)
        return
    for key, node in (tree or {}).items():
        yield from _cache_leaves(node, (*path, key))


@dataclass(frozen=True)
class Network:
    """A module on the meta device and where its parameters' values come from."""

    module: nn.Module
    component: str  # folder of the checkpoint: transformer, vae, text_encoder, face_encoder
    key_of: Callable[[str], str]  # parameter name in the module -> key in the weight files
    source: WeightSource

    def materialise(self, dtype: torch.dtype, device: str | torch.device = "cpu") -> nn.Module:
        """Read all weights as `dtype`. Returns the module in eval mode without gradients."""
        state, metas = {}, self.module.state_dict()
        values = read_all(self.source, [self.key_of(name) for name in metas])
        for (name, meta), value in zip(metas.items(), values, strict=True):
            target = parameter_dtype(name, meta, dtype)
            state[name] = value.to(device=device, dtype=target)
        self.module.load_state_dict(state, assign=True)
        fill_computed_buffers(self.module, device)
        return self.module.eval().requires_grad_(False)

    def share(self, other: nn.Module) -> nn.Module:
        """As `materialise`, with the very tensors of a network that has the same parameters."""
        self.module.load_state_dict(other.state_dict(), assign=True)
        fill_computed_buffers(self.module, next(other.parameters()).device)
        return self.module.eval().requires_grad_(False)


def parameter_dtype(name: str, meta: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Storage type of one parameter in a network of precision `dtype`.

    T5's feed-forward output overflows half precision; like transformers, it is kept in float32 then.
    """
    if not meta.is_floating_point():
        return meta.dtype
    if dtype == torch.float16 and name.endswith("DenseReluDense.wo.weight"):
        return torch.float32
    return dtype


def fill_computed_buffers(module: nn.Module, device: str | torch.device) -> None:
    """Replace meta buffers that no weight file holds by their computed values."""
    for submodule in module.modules():
        compute = getattr(submodule, "computed_buffers", None)
        if compute is not None:
            for name, value in compute().items():
                submodule.register_buffer(name, value.to(device), persistent=False)


def transformer_networks(
    config: TransformerConfig,
    *,
    folded: bool,
    kernels: Kernels = "reference",
    attention: str = "torch",
    control_blocks: int = 0,
) -> dict[str, nn.Module]:
    """The transformer's stages on the meta device, keyed by stage.

    folded: identity attention in its folded form. control_blocks: residuals that the denoiser takes.
    kernels: "triton" puts the fused kernels into the denoiser, which are always folded. attention: over its
    joint tokens, a name of `attention_with`, with or without those kernels.
    Raises BackendError where it isn't known or installed.
    """
    form: IdentityForm = "triton" if kernels == "triton" else "folded" if folded else "published"
    block = FusedBlock if kernels == "triton" else Block
    networks: dict[str, nn.Module] = {}
    with torch.device("meta"):
        if config.fusion is not None:
            networks["identity_fusion"] = IdentityFusion(config.fusion)
        if isinstance(config.schedule, LocalFacialConfig):
            networks["identity_schedule"] = LocalFacialExtractor(config.schedule)
        else:
            networks["identity_schedule"] = IdentitySchedule(config.schedule)
        kind = ControlledDenoiser if control_blocks else Denoiser
        denoiser = kind(config, form=form, block=block, attention=attention_with(attention))
        if isinstance(denoiser, ControlledDenoiser):
            denoiser.control_blocks = control_blocks
        networks["denoiser"] = denoiser
    return networks


def vae_on_meta(config: Mapping[str, Any]) -> nn.Module:
    """diffusers' AutoencoderKLCogVideoX without weights, with its convolutions made traceable."""
    from diffusers import AutoencoderKLCogVideoX
    from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXSafeConv3d

    with torch.device("meta"):
        vae = AutoencoderKLCogVideoX.from_config(dict(config))
    for module in vae.modules():
        if isinstance(module, CogVideoXSafeConv3d):
            # Its forward splits inputs over 2 GB, a branch on the data's size that can't be traced with
            # dynamic height and width. Chunks and tiles keep our inputs below that size.
            module.forward = nn.Conv3d.forward.__get__(module)  # type: ignore[method-assign]
    return vae  # type: ignore[no-any-return]
