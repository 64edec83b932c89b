"""Sizes of the tiny model, as the configuration files of its checkpoint."""

from __future__ import annotations

from typing import Any

from proteus_deploy.tiny import checkpoint as untrained
from proteus_deploy.training.settings import TrainSettings

__all__ = ["TRAINING", "TRANSFORMER", "VAE"]

TEXT_TOKENS = 48  # 16 fused ones and 32 of the prompt; avatars' longest has 32
TEXT_WIDTH = 128
FACE_DIM, POOLED_DIM = 64, 64
TOWER_WIDTH = 96
QUERIES = 16  # identity prompts are cut to as many tokens; avatars' longest has 15

VAE: dict[str, Any] = {
    **untrained.VAE,
    "block_out_channels": [16, 32, 64, 64],
    "norm_num_groups": 8,
    # Measured on training clips once the network was trained, see vae.py; 1.0 until then.
    "scaling_factor": 1.0,
}

TRANSFORMER: dict[str, Any] = {
    **untrained.TRANSFORMER,
    "attention_head_dim": 32,
    "num_attention_heads": 6,
    "num_layers": 6,
    "max_text_seq_length": TEXT_TOKENS,
    "text_embed_dim": TEXT_WIDTH,
    "time_embed_dim": 112,
    "cross_attn_dim_head": 32,
    "cross_attn_num_heads": 4,
    "FT_clip_dim": FACE_DIM + POOLED_DIM,
    "FT_depth": 5,
    "FT_dim_head": 32,
    "FT_num_heads": 4,
    "FT_num_querie": QUERIES,
    "FT_output_dim": TEXT_WIDTH,
    "FT_txt_dim": TEXT_WIDTH,
    "FT_vit_dim": TOWER_WIDTH,
    "FFE_clip_dim": FACE_DIM + POOLED_DIM,
    "FFE_heads": 4,
    "FFE_input_fuse_dim": TEXT_WIDTH,
    "FFE_input_img_dim": 96,
    "FFE_layers": 3,
    "FFE_num_queries": 12,
    "FFE_output_dim": 128,
    "FFE_query_dim": 128,
    "FFE_time_channel": 128,
    "FFE_time_embed_dim": 128,
    "FFE_vit_dim": TOWER_WIDTH,
    "LFE_id_dim": FACE_DIM + POOLED_DIM,
    "LFE_num_querie": 12,
    "LFE_output_dim": 128,
    "LFE_vit_dim": TOWER_WIDTH,
}

# Not the published recipe, which goes on from a trained backbone: this one begins with nothing, so its rate
# is higher and a tenth of the prompts is dropped, without which guidance would have nothing to guide with.
# Fewer steps look at the head only, as clothes and places are to be learned too, and motion counts for more:
# a mouth or an eyelid is a hundredth of a frame.
TRAINING = TrainSettings(
    steps=4000,
    batch_size=16,
    optimiser="muon",
    learning_rate=2e-3,
    warmup=200,
    betas=(0.9, 0.99),
    ema=0.9985,
    mixed_precision="bf16",
    gradient_checkpointing=False,
    attention="plain",
    text_dropout=0.1,
    mask_probability=0.3,
    aml_lambda=4,
    seed=0,
)
