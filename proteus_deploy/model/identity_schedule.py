"""TAII, timestep-aware identity injection: fused tokens -> face tokens for every timestep.

Depends on the identity and the timestep only, so all T timesteps of a schedule run as one batch,
once per (photo, identity prompt, schedule). `LocalFacialExtractor` is ConsisID's counterpart: it has
no timestep, and its tokens are repeated over T.
Axes: T timesteps, Q face tokens, M image tokens, d width.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from proteus_deploy.model.config import LocalFacialConfig, ScheduleConfig
from proteus_deploy.model.layers import PerceiverAttention, SinusoidTable, TimestepMLP, feed_forward, mapping

_ADA_EPS = 1e-6


class _AdaLayerNorm(nn.Module):
    """LayerNorm without affine, then scale and shift from the timestep's vector."""

    def __init__(self, width: int, time_embed_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(time_embed_dim, 2 * width)

    def forward(self, x: Tensor, time_vector: Tensor) -> Tensor:
        shift, scale = self.linear(F.silu(time_vector))[:, None].chunk(2, dim=-1)
        normed = F.layer_norm(x, x.shape[-1:], eps=_ADA_EPS)
        return normed * (1 + scale) + shift  # type: ignore[no-any-return]


class _SquaredReluMLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 2 * width)
        self.c_proj = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.relu(self.c_fc(x)).square())  # type: ignore[no-any-return]


class _CrossAttention(nn.Module):
    """nn.MultiheadAttention's parameters and maths, written so that it exports with a dynamic batch."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, query: Tensor, context: Tensor) -> Tensor:
        width = query.shape[-1]
        q = F.linear(query, self.in_proj_weight[:width], self.in_proj_bias[:width])
        kv = F.linear(context, self.in_proj_weight[width:], self.in_proj_bias[width:])
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, *kv.chunk(2, dim=-1)))
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class _TimeAwareBlock(nn.Module):
    def __init__(self, config: ScheduleConfig) -> None:
        super().__init__()
        width, time_dim = config.width, config.time_embed_dim
        self.ln_1 = _AdaLayerNorm(width, time_dim)
        self.ln_fuse = _AdaLayerNorm(width, time_dim)
        self.attn_fuse = _CrossAttention(width, config.heads)
        self.ln_2 = _AdaLayerNorm(width, time_dim)
        self.ln_img = _AdaLayerNorm(width, time_dim)
        self.attn_img = _CrossAttention(width, config.heads)
        self.ln_ff = _AdaLayerNorm(width, time_dim)
        self.mlp = _SquaredReluMLP(width)

    def forward(self, latents: Tensor, fused: Tensor, image: Tensor, time: Tensor) -> Tensor:
        normed = self.ln_1(latents, time)
        latents = latents + self.attn_fuse(normed, torch.cat((normed, self.ln_fuse(fused, time)), dim=1))
        normed = self.ln_2(latents, time)
        latents = latents + self.attn_img(normed, torch.cat((normed, self.ln_img(image, time)), dim=1))
        return latents + self.mlp(self.ln_ff(latents, time))  # type: ignore[no-any-return]


class _Connector(nn.Module):
    def __init__(self, config: ScheduleConfig) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.empty(1, config.queries, config.width))
        self.time_aware_linear = nn.Linear(config.time_embed_dim, config.width)
        self.proj_fuse = nn.Linear(config.fused_dim, config.width)
        self.proj_img = nn.Linear(config.image_proj_dim, config.width)
        self.perceiver_blocks = nn.ModuleList(_TimeAwareBlock(config) for _ in range(config.depth))
        self.proj_out = nn.Sequential(nn.Linear(config.width, config.out_dim), nn.LayerNorm(config.out_dim))

    def forward(self, fused: Tensor, image: Tensor, time: Tensor) -> Tensor:
        latents = self.latents + self.time_aware_linear(F.silu(time))[:, None]
        count = time.shape[0]
        fused = self.proj_fuse(fused).expand(count, -1, -1)
        image = self.proj_img(image).expand(count, -1, -1)
        for block in self.perceiver_blocks:
            latents = block(latents, fused, image, time)
        return self.proj_out(latents)  # type: ignore[no-any-return]


class _FaceFeature(nn.Module):
    def __init__(self, config: ScheduleConfig) -> None:
        super().__init__()
        self.clip_embedding_mapping = mapping(config.identity_dim, config.image_dim, config.image_dim)
        self.vit_embedding_mapping = mapping(config.image_dim, config.image_dim, config.image_proj_dim)

    def forward(self, id_cond: Tensor, last_state: Tensor) -> Tensor:
        features = torch.cat((self.clip_embedding_mapping(id_cond), last_state), dim=1)
        return self.vit_embedding_mapping(features)  # type: ignore[no-any-return]


class _FacialExtractor(nn.Module):
    def __init__(self, config: ScheduleConfig) -> None:
        super().__init__()
        self.config = config
        self.fuse_face_feature = _FaceFeature(config)
        self.time_table = SinusoidTable(config.time_channels)
        self.time_embedding = TimestepMLP(config.time_channels, config.time_embed_dim)
        self.connector = _Connector(config)
        # In every published checkpoint and used by nothing there; kept so that all keys are accounted for.
        self.latents = nn.Parameter(torch.empty(1, config.queries, config.width))
        self.proj_out = nn.Sequential(nn.Linear(config.width, config.out_dim), nn.LayerNorm(config.out_dim))

    def forward(self, fused: Tensor, id_cond: Tensor, last_state: Tensor, timesteps: Tensor) -> Tensor:
        time = self.time_embedding(self.time_table(timesteps).to(fused.dtype))
        return self.connector(fused, self.fuse_face_feature(id_cond, last_state), time)  # type: ignore[no-any-return]


class IdentitySchedule(nn.Module):
    """The `identity_schedule` stage of Proteus-ID."""

    def __init__(self, config: ScheduleConfig) -> None:
        super().__init__()
        self.fuse_facital_attention = _FacialExtractor(config)

    def forward(self, fused: Tensor, id_cond: Tensor, last_state: Tensor, timesteps: Tensor) -> Tensor:
        """fused [1, Q, d_text], id_cond [1, 1, C], last_state [1, M, V], timesteps [T] -> [T, Q, d_face]."""
        return self.fuse_facital_attention(fused, id_cond, last_state, timesteps)  # type: ignore[no-any-return]


class LocalFacialExtractor(nn.Module):
    """The `identity_schedule` stage of ConsisID: the same tokens at every timestep."""

    def __init__(self, config: LocalFacialConfig) -> None:
        super().__init__()
        self.local_facial_extractor = _LocalFacial(config)

    def forward(self, id_cond: Tensor, *args: Tensor) -> Tensor:
        """id_cond [1, 1, C], image_states 5 x [1, M, V], timesteps [T] -> face tokens [T, Q, d_face]."""
        *image_states, timesteps = args
        tokens = self.local_facial_extractor(id_cond, image_states)
        return tokens.expand(timesteps.shape[0], -1, -1)  # type: ignore[no-any-return]


class _LocalFacial(nn.Module):
    def __init__(self, config: LocalFacialConfig) -> None:
        super().__init__()
        width = config.width
        self.config = config
        self.latents = nn.Parameter(torch.empty(1, config.queries, width))
        self.proj_out = nn.Parameter(torch.empty(width, config.out_dim))
        self.id_embedding_mapping = mapping(config.identity_dim, width, width * config.identity_tokens)
        for scale in range(config.scales):
            self.add_module(f"mapping_{scale}", mapping(width, width, width))
        self.layers = nn.ModuleList(
            nn.ModuleList(
                (
                    PerceiverAttention(width, config.heads, config.head_dim),
                    feed_forward(width, width * config.ff_mult),
                )
            )
            for _ in range(config.depth)
        )

    def forward(self, id_cond: Tensor, image_states: list[Tensor]) -> Tensor:
        identity = self.id_embedding_mapping(id_cond).reshape(
            -1, self.config.identity_tokens, self.config.width
        )
        latents = torch.cat((self.latents.expand(identity.shape[0], -1, -1), identity), dim=1)
        per_scale = self.config.depth // self.config.scales
        for index, layer in enumerate(self.layers):
            attention, ff = cast("nn.ModuleList", layer)
            if index % per_scale == 0:
                scale = index // per_scale
                context = torch.cat(
                    (identity, self.get_submodule(f"mapping_{scale}")(image_states[scale])), dim=1
                )
            latents = latents + attention(context, latents)
            latents = latents + ff(latents)
        return latents[:, : self.config.queries] @ self.proj_out
