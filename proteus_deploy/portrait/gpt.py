"""LlamaGen's decoder: image tokens one after the other, from a class or a caption.

Axes: B sequences, N new positions, H heads, G heads of keys and values, D head size, C width.

Weights have the published names. Keys are rotated before they are cached, so a cache may keep any subset of
them in any order. Condition positions have a rotary table of zeros in the published code, not of ones: their
queries and keys are zero vectors, every later query sees them with the logit 0, and only their values speak.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from proteus_deploy.portrait.config import GptConfig

__all__ = ["Gpt", "LayerCache", "grid_rotary", "rotate"]


class LayerCache(Protocol):
    """Where a layer's keys and values go; see `cache.py` for those that there are."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Take in key and value [B, G, N, D], and attend from query [B, H, N, D]; returns [B, H, N, D]."""
        ...


class Gpt(nn.Module):
    """The decoder. Raises CheckpointError (through GptConfig) for sizes that can't be."""

    def __init__(self, config: GptConfig) -> None:
        super().__init__()
        self.config = config
        self.cls_embedding: ClassEmbedding | CaptionEmbedding
        if config.model_type == "c2i":
            self.cls_embedding = ClassEmbedding(config.num_classes, config.dim)
        else:
            self.cls_embedding = CaptionEmbedding(config.caption_dim, config.dim, config.cls_token_num)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RmsNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        table = grid_rotary(config.grid_size, config.head_dim, config.rope_base, config.cls_token_num)
        self.register_buffer("rotary", table, persistent=False)
        self.rotary: Tensor

    def cast(self, dtype: torch.dtype) -> Gpt:
        """Weights in this dtype, in place; the rotary table stays in float32."""
        rotary = self.rotary
        self.to(dtype)
        self.rotary = rotary
        return self

    def forward(
        self,
        embeddings: Tensor,
        rotary: Tensor,
        caches: Sequence[LayerCache] | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, N, vocabulary], float32, of what follows each position.

        embeddings: [B, N, C], from `embed_condition` or `tok_embeddings`. rotary: [N, D/2, 2], the table's
        rows of these positions. caches: one for each layer; without them each position sees those before it.
        mask: bool, broadcast to [B, H, N, positions]; True is seen. Without it attention is causal within N,
        or, with caches and N = 1, sees all that is kept.
        """
        x = embeddings
        for index, layer in enumerate(self.layers):
            x = layer(x, rotary, None if caches is None else caches[index], mask)
        return cast(Tensor, self.output(self.norm(x))).float()

    def embed_condition(self, condition: Tensor) -> Tensor:
        """[B, cls_token_num, C] of classes [B] or of caption features [B, cls_token_num, caption_dim].

        The class `num_classes` is the empty one.
        """
        return cast(Tensor, self.cls_embedding(condition))[:, : self.config.cls_token_num]

    def empty_condition(self, condition: Tensor) -> Tensor:
        """What guidance compares with, shaped as `condition`."""
        if isinstance(self.cls_embedding, ClassEmbedding):
            return torch.full_like(condition, self.config.num_classes)
        return self.cls_embedding.uncond_embedding.to(condition.dtype).expand_as(condition)


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: GptConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config.dim, config.hidden_dim)
        self.attention_norm = RmsNorm(config.dim, config.norm_eps)
        self.ffn_norm = RmsNorm(config.dim, config.norm_eps)

    def forward(self, x: Tensor, rotary: Tensor, cache: LayerCache | None, mask: Tensor | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotary, cache, mask)
        return x + cast(Tensor, self.feed_forward(self.ffn_norm(x)))


class Attention(nn.Module):
    """Self-attention; its cache decides what a query sees of the past."""

    def __init__(self, config: GptConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.n_head, config.kv_heads, config.head_dim
        self.wqkv = nn.Linear(config.dim, (self.heads + 2 * self.kv_heads) * self.head_dim, bias=False)
        self.wo = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x: Tensor, rotary: Tensor, cache: LayerCache | None, mask: Tensor | None) -> Tensor:
        packed = self.wqkv(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        query, key, value = packed.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        query, key = rotate(query, rotary), rotate(key, rotary)
        if cache is None:
            out = functional.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=mask,
                is_causal=mask is None,
                enable_gqa=self.heads != self.kv_heads,
            )
        else:
            out = cache.attend(query, key, value, mask)
        return cast(Tensor, self.wo(out.transpose(1, 2).flatten(2)))


class FeedForward(nn.Module):
    """w2(silu(w1 x) * w3 x)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w3 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.w2(functional.silu(self.w1(x)) * self.w3(x)))


class RmsNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) in float32, rounded, then times the weight."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x.float(), (x.shape[-1],), eps=self.eps).type_as(x) * self.weight


class ClassEmbedding(nn.Module):
    """A row for each class, and one for none."""

    def __init__(self, classes: int, dim: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, dim)

    def forward(self, classes: Tensor) -> Tensor:
        return cast(Tensor, self.embedding_table(classes)).unsqueeze(1)


class CaptionEmbedding(nn.Module):
    """Caption features through two layers; `uncond_embedding` stands for no caption."""

    def __init__(self, channels: int, dim: int, tokens: int) -> None:
        super().__init__()
        self.cap_proj = Projection(channels, dim)
        self.register_buffer("uncond_embedding", torch.randn(tokens, channels) / channels**0.5)
        self.uncond_embedding: Tensor

    def forward(self, features: Tensor) -> Tensor:
        return cast(Tensor, self.cap_proj(features))


class Projection(nn.Module):
    """fc2(gelu(fc1 x)), with the tanh form of gelu."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, dim, bias=False)
        self.fc2 = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.fc2(functional.gelu(self.fc1(x), approximate="tanh")))


def grid_rotary(grid: int, head_dim: int, base: float, condition_tokens: int) -> Tensor:
    """Cosines and sines, float32 [condition_tokens + grid^2, head_dim / 2, 2]; zeros for the condition.

    The first half of a head's pairs turns with the row, the second with the column.
    """
    half = head_dim // 2
    frequencies = 1.0 / base ** (torch.arange(0, half, 2).float() / half)
    angles = torch.outer(torch.arange(grid).float(), frequencies)
    rows, columns = angles[:, None].expand(-1, grid, -1), angles[None].expand(grid, -1, -1)
    angles = torch.cat([rows, columns], dim=-1).flatten(0, 1)
    table = torch.stack([angles.cos(), angles.sin()], dim=-1)
    return torch.cat([torch.zeros(condition_tokens, half, 2), table])


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Turn neighbouring pairs of channels. x [B, H, N, D]; rotary [N, D/2, 2]; the dtype stays x's."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = rotary.unbind(-1)
    turned = torch.stack([even * cosine - odd * sine, odd * cosine + even * sine], dim=-1)
    return turned.flatten(-2).type_as(x)
