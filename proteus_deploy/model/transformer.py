"""The denoiser: a CogVideoX image-to-video transformer with identity attention between its blocks.

Axes: B batch, F latent frames, C channels, h and w latent pixels, L text tokens, N video tokens,
S = L + N, H heads, D head size, d = H*D width, Q face tokens.
Sources: CogVideoX (arXiv 2408.06072) and its 1.5 release (`patch_size_t`, `ofs_embed_dim`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from proteus_deploy.kernels.joint_attention import Attention, attention, modulated_norm, rotate
from proteus_deploy.model.config import BackboneConfig, TransformerConfig
from proteus_deploy.model.identity_attention import IdentityAttention, IdentityForm
from proteus_deploy.model.layers import SinusoidTable, TimestepMLP
from proteus_deploy.model.low_rank import BlockAdapters, LowRank

OFS = 2  # the one value that CogVideoX 1.5's pipelines ever pass for the `ofs` input
_QK_NORM_EPS = 1e-6

Rotary = tuple[Tensor, Tensor]


class Denoiser(nn.Module):
    """The `denoiser` stage: one evaluation of the velocity."""

    def __init__(
        self,
        config: TransformerConfig,
        *,
        form: IdentityForm = "published",
        block: type[Block] | None = None,
        attention: Attention = attention,
    ) -> None:
        """form: of identity attention. block: `Block`, or one with its parameters and another forward.
        attention: over the joint tokens, as `attention_with` gives it."""
        super().__init__()
        backbone, identity = config.backbone, config.identity_attention
        self.config = backbone
        self.interval = identity.interval
        self.patch_embed = PatchEmbed(backbone)
        table = partial(
            SinusoidTable, flip_sin_to_cos=backbone.flip_sin_to_cos, freq_shift=backbone.freq_shift
        )
        self.time_table = table(backbone.width)
        self.time_embedding = TimestepMLP(backbone.width, backbone.time_embed_dim)
        if backbone.ofs_embed_dim is not None:
            self.ofs_table = table(backbone.ofs_embed_dim)
            self.ofs_embedding = TimestepMLP(backbone.ofs_embed_dim, backbone.ofs_embed_dim)
        self.transformer_blocks = nn.ModuleList(
            (block or Block)(backbone, attention) for _ in range(backbone.num_layers)
        )
        sites = -(
            -backbone.num_layers // identity.interval
        )  # ceil: one after blocks 0, interval, 2*interval, ...
        self.perceiver_cross_attention = nn.ModuleList(
            IdentityAttention(backbone.width, identity, form=form) for _ in range(sites)
        )
        self.norm_final = nn.LayerNorm(backbone.width, backbone.norm_eps)
        self.norm_out = _FinalModulation(backbone)
        self.proj_out = nn.Linear(backbone.width, _patch_volume(backbone) * backbone.out_channels)

    def forward(
        self,
        latents: Tensor,
        text: Tensor,
        timestep: Tensor,
        face_tokens: Tensor,
        identity_gate: Tensor,
        rotary_cos: Tensor | None = None,
        rotary_sin: Tensor | None = None,
        adapter_down: Tensor | None = None,
        adapter_up: Tensor | None = None,
        adapter_scale: Tensor | None = None,
        control: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Velocity [B, F, out_channels, h, w] of one denoising step.

        latents [B, F, in_channels, h, w] (noisy and condition side by side), text [B, L, d_text] with the
        fused tokens in front, timestep [B] int64, face_tokens [B or 1, Q, d_face], identity_gate [1]
        float32, rotary tables [f, y, x, D] float32 over the token grid (None without rotary embedding),
        adapters as in `BlockAdapters` and control, a [B, f, y, x, d] to add after each of the first blocks
        (None where there are none).
        """
        time = self.time_vector(timestep, latents.dtype)
        text, video = self.patch_embed(text, latents)
        rotary = None
        if rotary_cos is not None and rotary_sin is not None:
            rotary = pad_rotary(rotary_cos, rotary_sin, text.shape[1])
        adapters = None
        if adapter_down is not None and adapter_up is not None and adapter_scale is not None:
            adapters = BlockAdapters(adapter_down, adapter_up, adapter_scale)
        residuals = None if control is None else [residual.flatten(1, 3) for residual in control]
        patches = self.denoise_tokens(
            text, video, time, rotary, face_tokens, identity_gate, adapters, residuals
        )
        return self.unpatchify(patches, latents)

    def denoise_tokens(
        self,
        text: Tensor,
        video: Tensor,
        time: Tensor,
        rotary: Rotary | None,
        face_tokens: Tensor,
        identity_gate: Tensor,
        adapters: BlockAdapters | None = None,
        control: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Tokens [B, L, d] and [B, N, d] -> velocity patches [B, N, patch volume * out_channels].

        control: residuals [B, N, d] of the first blocks.
        """
        for index, block in enumerate(self.transformer_blocks):
            adapter = None if adapters is None else adapters.of(index)
            text, video = block(text, video, time, rotary, adapter)
            if control is not None and index < len(control):
                video = video + control[index]
            if index % self.interval == 0:
                identity = self.perceiver_cross_attention[index // self.interval]
                video = identity(video, face_tokens, identity_gate)
        return self.proj_out(self.norm_out(self.norm_final(video), time))  # type: ignore[no-any-return]

    def time_vector(self, timestep: Tensor, dtype: torch.dtype) -> Tensor:
        """[B] -> [B, time_embed_dim]."""
        time = self.time_embedding(self.time_table(timestep).to(dtype))
        if self.config.ofs_embed_dim is not None:
            ofs = torch.full((1,), OFS, device=timestep.device)
            time = time + self.ofs_embedding(self.ofs_table(ofs).to(dtype))
        return time  # type: ignore[no-any-return]

    def unpatchify(self, patches: Tensor, latents: Tensor) -> Tensor:
        """[B, N, patch volume * C] -> [B, F, C, h, w] with the frames and size of `latents`."""
        batch, frames, _, height, width = latents.shape
        p = self.config.patch_size
        grid = (height // p, width // p)
        if (p_t := self.config.patch_size_t) is None:
            x = patches.reshape(batch, frames, *grid, -1, p, p)
            return x.permute(0, 1, 4, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4)
        x = patches.reshape(batch, frames // p_t, *grid, -1, p_t, p, p)
        return x.permute(0, 1, 5, 4, 2, 6, 3, 7).flatten(6, 7).flatten(4, 5).flatten(1, 2)


class ControlledDenoiser(Denoiser):
    """A denoiser whose graph always has residuals, and adapters only where they were asked for."""

    control_blocks = 0  # how many residuals there are

    def forward(  # type: ignore[override]
        self,
        latents: Tensor,
        text: Tensor,
        timestep: Tensor,
        face_tokens: Tensor,
        identity_gate: Tensor,
        rotary_cos: Tensor,
        rotary_sin: Tensor,
        *side: Tensor | None,
    ) -> Tensor:
        """As `Denoiser.forward`, with its inputs in the order of the graph's: residuals, then adapters."""
        residuals, adapters = side[: self.control_blocks], side[self.control_blocks :]
        control = [residual for residual in residuals if residual is not None]  # all of them or none
        down, up, scale = adapters or (None, None, None)
        inputs = (latents, text, timestep, face_tokens, identity_gate, rotary_cos, rotary_sin)
        return super().forward(*inputs, down, up, scale, control or None)


class Block(nn.Module):
    def __init__(self, config: BackboneConfig, attention: Attention = attention) -> None:
        super().__init__()
        self.norm1 = ExpertModulation(config)
        self.attn1 = JointAttention(config, attention)
        self.norm2 = ExpertModulation(config)
        self.ff = _FeedForward(config.width)

    def forward(
        self,
        text: Tensor,
        video: Tensor,
        time: Tensor,
        rotary: Rotary | None,
        adapter: LowRank | None = None,
    ) -> tuple[Tensor, Tensor]:
        length = text.shape[1]
        normed, text_gate, video_gate = self.norm1(text, video, time)
        attended = self.attn1(normed, rotary, adapter)
        text = text + text_gate * attended[:, :length]
        video = video + video_gate * attended[:, length:]
        normed, text_gate, video_gate = self.norm2(text, video, time)
        transformed = self.ff(normed)
        return text + text_gate * transformed[:, :length], video + video_gate * transformed[:, length:]


class Modulation(NamedTuple):
    """What the time does to one norm and what follows it, [B, 1, d] each, in the order of the weights."""

    video_shift: Tensor
    video_scale: Tensor
    video_gate: Tensor
    text_shift: Tensor
    text_scale: Tensor
    text_gate: Tensor


class ExpertModulation(nn.Module):
    """Expert adaptive layer norm: one norm, its own shift, scale and gate for video and for text."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.time_embed_dim, 6 * config.width)
        self.norm = nn.LayerNorm(config.width, config.norm_eps)

    def vectors(self, time: Tensor) -> Modulation:
        """Of the time vector [B, time_embed_dim]: [B, 1, d] each."""
        return Modulation(*self.linear(F.silu(time)).unsqueeze(1).chunk(6, dim=-1))

    def forward(self, text: Tensor, video: Tensor, time: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Joint normalised tokens [B, S, d] and the two gates [B, 1, d]."""
        vectors, norm = self.vectors(time), self.norm
        normed_text = modulated_norm(
            text, vectors.text_shift, vectors.text_scale, norm.weight, norm.bias, norm.eps
        )
        normed_video = modulated_norm(
            video, vectors.video_shift, vectors.video_scale, norm.weight, norm.bias, norm.eps
        )
        return torch.cat((normed_text, normed_video), dim=1), vectors.text_gate, vectors.video_gate


class JointAttention(nn.Module):
    def __init__(self, config: BackboneConfig, attention: Attention = attention) -> None:
        """attention: query, key, value [B, H, S, D] -> [B, H, S, D]."""
        super().__init__()
        self.attention = attention
        width, bias = config.width, config.attention_bias
        self.heads = config.num_attention_heads
        self.to_q = nn.Linear(width, width, bias=bias)
        self.to_k = nn.Linear(width, width, bias=bias)
        self.to_v = nn.Linear(width, width, bias=bias)
        self.norm_q = nn.LayerNorm(config.attention_head_dim, _QK_NORM_EPS)
        self.norm_k = nn.LayerNorm(config.attention_head_dim, _QK_NORM_EPS)
        self.to_out = nn.ModuleList((nn.Linear(width, width),))

    def forward(self, x: Tensor, rotary: Rotary | None, adapter: LowRank | None = None) -> Tensor:
        query, key, value = (
            each.unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in self.project(x, adapter)
        )
        query, key = self.place(query, key, rotary)
        return self.merge(self.attention(query, key, value).transpose(1, 2).flatten(2), adapter)

    def project(self, x: Tensor, adapter: LowRank | None) -> Iterator[Tensor]:
        """Queries, keys and values [B, s, d] of tokens [B, s, d]."""
        for which, to in enumerate((self.to_q, self.to_k, self.to_v)):
            yield to(x) if adapter is None else to(x) + adapter.projection(x, which)

    def merge(self, attended: Tensor, adapter: LowRank | None) -> Tensor:
        """The heads' output [B, s, d] -> [B, s, d]."""
        out: Tensor = self.to_out[0](attended)
        return out if adapter is None else out + adapter.out(attended)

    def place(self, query: Tensor, key: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor]:
        """Norm queries and keys [B, H, S, D] and turn them to their positions."""
        query, key = self.norm_q(query), self.norm_k(key)
        if rotary is None:
            return query, key
        return rotate(query, *rotary), rotate(key, *rotary)


class _FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        expand = nn.Module()
        expand.proj = nn.Linear(width, 4 * width)
        # Index 1 was a dropout in the published module; it has no parameters.
        self.net = nn.ModuleList((expand, nn.Identity(), nn.Linear(4 * width, width)))

    def forward(self, x: Tensor) -> Tensor:
        expanded = F.gelu(self.net[0].proj(x), approximate="tanh")  # type: ignore[operator]
        return self.net[2](expanded)  # type: ignore[no-any-return]


class _FinalModulation(nn.Module):
    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.time_embed_dim, 2 * config.width)
        self.norm = nn.LayerNorm(config.width, config.norm_eps)

    def forward(self, video: Tensor, time: Tensor) -> Tensor:
        shift, scale = self.linear(F.silu(time)).unsqueeze(1).chunk(2, dim=-1)
        return modulated_norm(video, shift, scale, self.norm.weight, self.norm.bias, self.norm.eps)


class PatchEmbed(nn.Module):
    """Text projection and video patches; adds learned or sinusoidal positions where there are any."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        width, p = config.width, config.patch_size
        self.proj: nn.Conv2d | nn.Linear  # as published
        if config.patch_size_t is None:
            self.proj = nn.Conv2d(config.in_channels, width, p, stride=p, bias=config.patch_bias)
        else:
            # patch_bias applies to the convolution only: 1.5's linear projection was published with a bias
            self.proj = nn.Linear(config.in_channels * _patch_volume(config), width)
        self.text_proj = nn.Linear(config.text_embed_dim, width)
        self.has_positions = config.learned_positions or not config.rotary
        if self.has_positions:
            self.pos_embedding: Tensor
            tokens = config.max_text_seq_length + _grid_size(config)
            # Only learned tables are part of a checkpoint; the sinusoidal one is computed.
            persistent = config.learned_positions
            self.register_buffer("pos_embedding", torch.empty(1, tokens, width), persistent=persistent)

    def forward(self, text: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
        """text [B, L, d_text], latents [B, F, C, h, w] -> [B, L, d] and [B, N, d]."""
        text = self.text_proj(text)
        # A convolution whose stride is its kernel is a product; compilers know more about those.
        patches = _fold_patches(latents, self.config.patch_size, self.config.patch_size_t or 1)
        video = F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)
        if not self.has_positions:
            return text, video
        length = self.config.max_text_seq_length
        positions = self.pos_embedding.to(video.dtype)
        return text + positions[:, : text.shape[1]], video + positions[:, length : length + video.shape[1]]

    def computed_buffers(self) -> dict[str, Tensor]:
        """The sinusoidal table of checkpoints with neither rotary nor learned positions (CogVideoX-2B)."""
        config = self.config
        if not self.has_positions or config.learned_positions:
            return {}
        from diffusers.models.embeddings import get_3d_sincos_pos_embed

        table = get_3d_sincos_pos_embed(
            config.width,
            (config.sample_width // config.patch_size, config.sample_height // config.patch_size),
            (config.sample_frames - 1) // config.temporal_compression_ratio + 1,
            config.spatial_interpolation_scale,
            config.temporal_interpolation_scale,
        ).flatten(0, 1)
        text = table.new_zeros(config.max_text_seq_length, config.width)
        return {"pos_embedding": torch.cat((text, table))[None]}


def _fold_patches(latents: Tensor, p: int, p_t: int) -> Tensor:
    """[B, F, C, h, w] -> [B, N, C * p_t * p * p], channel slowest."""
    batch, frames, channels, height, width = latents.shape
    x = latents.permute(0, 1, 3, 4, 2).reshape(
        batch, frames // p_t, p_t, height // p, p, width // p, p, channels
    )
    return x.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(4, 7).flatten(1, 3)


def _patch_volume(config: BackboneConfig) -> int:
    return config.patch_size**2 * (config.patch_size_t or 1)


def _grid_size(config: BackboneConfig) -> int:
    """Video tokens at the sample size of the config."""
    frames = (config.sample_frames - 1) // config.temporal_compression_ratio + 1
    return frames * (config.sample_height // config.patch_size) * (config.sample_width // config.patch_size)


def pad_rotary(cos: Tensor, sin: Tensor, text_length: int) -> Rotary:
    """Rotary tables of the video grid [f, y, x, D] -> [S, D] for the joint sequence: text is not rotated."""
    cos, sin = cos.flatten(0, -2), sin.flatten(0, -2)
    head = cos.shape[-1]
    return (
        torch.cat((cos.new_ones(text_length, head), cos)),
        torch.cat((sin.new_zeros(text_length, head), sin)),
    )


def rotary_tables(config: BackboneConfig, frames: int, rows: int, columns: int) -> Rotary:
    """cos and sin [frames, rows, columns, D] float32 of a token grid, as the published pipelines make them.

    CogVideoX 1.0 stretches the grid into the sample size's crop region; 1.5 cuts it from the largest grid.
    """
    from diffusers.models.embeddings import get_3d_rotary_pos_embed
    from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

    base_rows, base_columns = (
        config.sample_height // config.patch_size,
        config.sample_width // config.patch_size,
    )
    head, grid = config.attention_head_dim, (rows, columns)
    if config.patch_size_t is None:
        crop = get_resize_crop_region_for_grid(grid, base_columns, base_rows)
        cos, sin = get_3d_rotary_pos_embed(head, crop, grid, frames)
    else:
        largest = (base_rows, base_columns)
        cos, sin = get_3d_rotary_pos_embed(head, None, grid, frames, grid_type="slice", max_size=largest)
    shape = (frames, rows, columns, config.attention_head_dim)
    return cos.reshape(shape), sin.reshape(shape)
