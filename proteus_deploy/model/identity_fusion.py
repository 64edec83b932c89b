"""MIF, multimodal identity fusion: identity text + face embedding + image scales -> fused tokens.

Depends on neither the timestep nor the prompt, so it runs once per (photo, identity prompt).
Axes: B photos, Q fused tokens, P identity-text tokens, M image tokens, d width.
Source: Proteus-ID (arXiv 2506.23729), section on MIF; shapes as in the published checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from proteus_deploy.model.config import FusionConfig
from proteus_deploy.model.layers import PerceiverAttention, feed_forward, heads_attention, mapping


class _SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, heads * head_dim, bias=False)
        self.to_k = nn.Linear(width, heads * head_dim, bias=False)
        self.to_v = nn.Linear(width, heads * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        attended = heads_attention(self.to_q(x), self.to_k(x), self.to_v(x), self.heads)
        return self.to_out(attended)  # type: ignore[no-any-return]


class _TokenFormer(nn.Module):
    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        width = config.width
        self.config = config
        self.latents = nn.Parameter(torch.empty(1, config.queries, width))
        self.proj_out = nn.Parameter(torch.empty(width, width))
        self.img_embedding_mapping = mapping(config.identity_dim, config.image_dim, width)
        for scale in range(config.scales):
            self.add_module(f"mapping_{scale}", mapping(config.image_dim, config.image_dim, width))
        self.layers = nn.ModuleList(
            nn.ModuleList(
                (
                    _SelfAttention(width, config.heads, config.head_dim),
                    PerceiverAttention(width, config.heads, config.head_dim),
                    feed_forward(width, width),
                )
            )
            for _ in range(config.depth)
        )

    def forward(self, identity_text: Tensor, id_cond: Tensor, image_states: Sequence[Tensor]) -> Tensor:
        queries = self.latents.expand(id_cond.shape[0], -1, -1)
        tokens = torch.cat((queries, identity_text), dim=1)
        identity = self.img_embedding_mapping(id_cond)
        per_scale = self.config.depth // self.config.scales
        for index, layer in enumerate(self.layers):
            self_attention, cross_attention, ff = cast("nn.ModuleList", layer)
            if index % per_scale == 0:
                scale = index // per_scale
                image = self.get_submodule(f"mapping_{scale}")(image_states[scale])
                context = torch.cat((identity, image), dim=1)
            tokens = tokens + self_attention(tokens)
            tokens = tokens + cross_attention(context, tokens)
            tokens = tokens + ff(tokens)
        return tokens[:, : self.config.queries] @ self.proj_out


class _TokenAdapter(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.feature_mapping = mapping(width, width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.feature_mapping(x)  # type: ignore[no-any-return]


class IdentityFusion(nn.Module):
    """The `identity_fusion` stage."""

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        self.fuse_token_former = _TokenFormer(config)
        self.fuse_token_adapter = _TokenAdapter(config.width)

    def forward(self, identity_text: Tensor, id_cond: Tensor, *image_states: Tensor) -> Tensor:
        """identity_text [B, P, d], id_cond [B, 1, C], 5 image states [B, M, V] -> fused tokens [B, Q, d]."""
        return self.fuse_token_adapter(self.fuse_token_former(identity_text, id_cond, image_states))  # type: ignore[no-any-return]


def combine_text_and_identity(text: Tensor, mask: Tensor, fused: Tensor) -> Tensor:
    """Text sequence for the denoiser: [fused tokens ; as many valid prompt tokens as fit ; zeros].

    text [B, L, d]; mask [B, L], non-zero where a token is valid, in any pattern; fused [B or 1, Q, d], Q < L.
    Returns [B, L, d]. Invalid slots are exact zeros, whatever the encoder left there (also NaN).
    No step depends on the data, so the function can be traced: the sort keys are unique, which makes
    an unstable sort keep the order of the valid tokens.
    """
    batch, length, _ = text.shape
    room = length - fused.shape[1]
    valid = mask != 0
    position = torch.arange(length, device=text.device)
    order = torch.argsort(torch.where(valid, position, position + length), dim=1)[:, :room]
    chosen = text.gather(1, order[..., None].expand(-1, -1, text.shape[-1]))
    kept = valid.gather(1, order)[..., None]
    prompt = torch.where(kept, chosen, torch.zeros_like(chosen))
    return torch.cat((fused.expand(batch, -1, -1).to(text.dtype), prompt), dim=1)
