"""The transformer as it is trained: MIF, TAII and denoiser in one module, from conditions to a velocity.

Serving runs MIF once per identity and TAII once per schedule. In training each clip has its own identity and
timestep, so all three run for each clip, and gradients pass through all of them.

Axes: B clips, T latent frames, C channels, h x w the latent grid, L prompt tokens, P identity-prompt tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from proteus_deploy.errors import InputError
from proteus_deploy.model.config import TransformerConfig
from proteus_deploy.model.identity_fusion import IdentityFusion, combine_text_and_identity
from proteus_deploy.model.identity_schedule import IdentitySchedule
from proteus_deploy.model.networks import fill_computed_buffers, transformer_networks
from proteus_deploy.model.transformer import Denoiser, rotary_tables

__all__ = ["Trainable", "TrainableTransformer", "initialise", "parameter_count", "published_names"]

Trainable = Literal["identity", "all"]

# In every published checkpoint and read by nothing: a process group would wait for their gradients for ever.
_UNUSED = ("fuse_facital_attention.latents", "fuse_facital_attention.proj_out.")


class TrainableTransformer(nn.Module):
    """All that `transformer/` of a checkpoint holds, under its published keys.

    fusion_text: whether MIF reads the identity prompt. time_aware: whether TAII knows the timestep; if not,
    it is told 0 at every step. Both are ablations, and what serves such a network has to do the same.
    """

    def __init__(
        self, config: TransformerConfig, *, fusion_text: bool = True, time_aware: bool = True
    ) -> None:
        super().__init__()
        if config.fusion is None:
            raise InputError(
                f"this is a {config.lineage} transformer, which has no MIF; training takes a Proteus-ID one"
            )
        networks = transformer_networks(config, folded=False)
        self.config = config
        self.fusion_text = fusion_text
        self.time_aware = time_aware
        self.fusion = cast(IdentityFusion, networks["identity_fusion"])
        self.schedule = cast(IdentitySchedule, networks["identity_schedule"])
        self.denoiser = cast(Denoiser, networks["denoiser"])
        self._rotary: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}

    def forward(
        self,
        noisy: Tensor,
        condition: Tensor,
        timesteps: Tensor,
        prompt: Tensor,
        prompt_mask: Tensor,
        identity: Tensor,
        id_cond: Tensor,
        image_states: Tensor,
    ) -> Tensor:
        """Velocity [B, T, C, h, w].

        noisy, condition [B, T, C, h, w]; timesteps int64 [B]; prompt [B, L, d_text], prompt_mask [B, L];
        identity [B, P, d_text]; id_cond [B, 1, c]; image_states [B, 5, N, W].
        """
        states = image_states.unbind(dim=1)
        identity = identity if self.fusion_text else identity[:, :0]
        fused = self.fusion(identity, id_cond, *states)
        told = timesteps if self.time_aware else torch.zeros_like(timesteps)
        face_tokens = self.schedule(fused, id_cond, states[-1], told)
        text = combine_text_and_identity(prompt, prompt_mask, fused)
        gate = torch.full((1,), self.config.identity_attention.scale, device=noisy.device)
        cosines, sines = self._rotary_tables(noisy)
        velocity: Tensor = self.denoiser(
            torch.cat((noisy, condition), dim=2), text, timesteps, face_tokens, gate, cosines, sines
        )
        return velocity

    def _rotary_tables(self, latents: Tensor) -> tuple[Tensor | None, Tensor | None]:
        backbone = self.config.backbone
        if not backbone.rotary:
            return None, None
        frames, _, height, width = latents.shape[1:]
        grid = (
            frames // (backbone.patch_size_t or 1),
            height // backbone.patch_size,
            width // backbone.patch_size,
        )
        if grid not in self._rotary:
            cosines, sines = rotary_tables(backbone, *grid)
            self._rotary[grid] = cosines.to(latents.device), sines.to(latents.device)
        return self._rotary[grid]

    def check_sizes(self, clip: Mapping[str, Tensor]) -> None:
        """Raises InputError where this network can't take an encoded clip, as LatentDataset gives them."""
        backbone, fusion = self.config.backbone, self.config.fusion
        assert fusion is not None
        frames, channels, height, width = clip["latent_mean"].shape
        found = f"clips have {frames} latent frames of {channels} channels and {width}x{height}"
        if channels != backbone.out_channels:
            raise InputError(f"{found}; this transformer takes {backbone.out_channels} channels")
        patch, patch_t = backbone.patch_size, backbone.patch_size_t or 1
        if height % patch or width % patch or frames % patch_t:
            raise InputError(
                f"{found}; its patches are {patch_t} frames of {patch}x{patch}: choose multiples"
            )
        own = (
            (backbone.sample_frames - 1) // backbone.temporal_compression_ratio + 1,
            backbone.sample_height,
            backbone.sample_width,
        )
        if self.denoiser.patch_embed.has_positions and (frames, height, width) != own:
            raise InputError(
                f"{found}; this transformer's position table is for {own[0]} of {own[2]}x{own[1]} alone: "
                "prepare clips of the checkpoint's own size"
            )
        tokens = clip["prompt"].shape[0]
        if not fusion.queries < tokens <= backbone.max_text_seq_length:
            raise InputError(
                f"prompts have {tokens} tokens; choose a max_sequence_length above {fusion.queries}, which "
                f"the identity takes, and up to {backbone.max_text_seq_length}"
            )

    def published_state(self) -> dict[str, Tensor]:
        """Weights under the keys of a published checkpoint; tensors are shared with the module."""
        state: dict[str, Tensor] = {}
        for part in self.parts():
            state.update(part.state_dict())
        return state

    def load_published(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `published_state`. Raises InputError for keys that are missing or left over."""
        left = set(state)
        for part in self.parts():
            own = part.state_dict()
            missing = sorted(set(own) - set(state))
            if missing:
                raise InputError(f"the weights lack {missing[0]!r} and {len(missing) - 1} more keys")
            part.load_state_dict({key: state[key] for key in own}, assign=True)
            left -= set(own)
        if left:
            raise InputError(f"the weights hold {min(left)!r}, which this transformer doesn't have")

    def parts(self) -> tuple[nn.Module, ...]:
        return self.fusion, self.schedule, self.denoiser

    def select(self, trainable: Trainable) -> dict[str, nn.Parameter]:
        """Freeze what isn't trained; return what is, by name.

        "identity": MIF, TAII and the identity attention, on a frozen backbone. "all": every parameter, as the
        published recipe does.
        """
        if trainable not in ("identity", "all"):
            raise InputError(f"trainable is {trainable!r}; choose identity or all")
        chosen = {}
        for name, parameter in self.named_parameters():
            part, _, key = name.partition(".")
            unused = any(mark in key for mark in _UNUSED)
            backbone = part == "denoiser" and not key.startswith("perceiver_cross_attention.")
            parameter.requires_grad_(not unused and (trainable == "all" or not backbone))
            if parameter.requires_grad:
                chosen[name] = parameter
        return chosen

    def checkpoint_blocks(self) -> None:
        """Keep no activations inside transformer blocks: they are computed again on the way back."""
        for block in self.denoiser.transformer_blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def initialise(network: TrainableTransformer, *, seed: int) -> TrainableTransformer:
    """Fill a network on the meta device with random weights to train from nothing; returns it.

    Linear layers and convolutions get a uniform distribution of variance 1/(3 fan-in) (PyTorch's default),
    learned queries N(0, 1/width) as published. What starts at zero makes each block the identity at first:
    the modulation of the blocks (DiT's adaLN-Zero, arXiv 2212.09748), TAII's AdaLN as published, and the last
    projections of the identity attention and of the denoiser.
    """
    network.to_empty(device="cpu")
    for part in network.parts():
        fill_computed_buffers(part, "cpu")
    _fill_positions(network)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in network.modules():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.LayerNorm):
                module.reset_parameters()
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                _initialise_parameter(name, parameter)
    return network


def _fill_positions(network: TrainableTransformer) -> None:
    """A learned position table starts as the sinusoids of models that have no learned one."""
    backbone = network.config.backbone
    if not backbone.learned_positions:
        return
    patch_embed = network.denoiser.patch_embed
    computed = replace(backbone, learned_positions=False, rotary=False)
    with torch.device("meta"):
        table = type(patch_embed)(computed)
    patch_embed.pos_embedding.copy_(table.computed_buffers()["pos_embedding"])


_ZERO = (".norm1.linear.", ".norm2.linear.", "norm_out.linear.", "denoiser.proj_out.")
_ADAPTIVE = (".ln_1.linear.", ".ln_fuse.linear.", ".ln_2.linear.", ".ln_img.linear.", ".ln_ff.linear.")


def _initialise_parameter(name: str, parameter: Tensor) -> None:
    last_of_identity = "perceiver_cross_attention" in name and name.endswith(".to_out.weight")
    if last_of_identity or any(mark in name for mark in (*_ZERO, *_ADAPTIVE)):
        parameter.zero_()
    elif name.endswith((".latents", "former.proj_out")):
        parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
    elif name.endswith("in_proj_weight"):
        nn.init.xavier_uniform_(parameter)
    elif name.endswith("in_proj_bias"):
        parameter.zero_()


def published_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of the whole module under the keys of a checkpoint, which don't name the part."""
    return {name.partition(".")[2]: value for name, value in state.items()}


def parameter_count(parameters: Iterable[Any]) -> int:
    """Numbers in all of them."""
    return sum(parameter.numel() for parameter in parameters)
