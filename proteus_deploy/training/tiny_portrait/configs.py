"""Sizes of the tiny portrait model: LlamaGen's layout with 256 tokens of 8 pixels a side."""

from __future__ import annotations

from proteus_deploy.portrait.config import GptConfig, VqConfig
from proteus_deploy.portrait.plan import CacheSettings
from proteus_deploy.portrait.sampling import Sampling

__all__ = ["CACHE", "GPT", "SAMPLING", "SIDE", "VQ"]

SIDE = 128  # pixels

VQ = VqConfig(
    codebook_size=1024,
    encoder_ch_mult=(1, 1, 2, 2),
    decoder_ch_mult=(1, 1, 2, 2),
    z_channels=64,
    ch=32,
)

GPT = GptConfig(
    dim=192,
    n_layer=6,
    n_head=3,
    multiple_of=32,
    model_type="t2i",
    caption_dim=128,  # the tiny text encoder's width
    cls_token_num=32,  # the longest prompt of a photo has 26
    vocab_size=VQ.codebook_size,
    block_size=(SIDE // VQ.downsample) ** 2,
)

# Chosen on people that are neither trained on nor measured; see docs/portrait.md.
SAMPLING = Sampling(guidance_scale=2.0, temperature=0.8, top_k=0)
CACHE = CacheSettings("adsa", 0.5)
