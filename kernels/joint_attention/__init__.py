"""Joint text-video attention: modulated norm, rotary embedding, attention over all tokens."""

from proteus_deploy.kernels.joint_attention.choices import (
    Attention,
    attention_names,
    attention_with,
    check_attention_runs_on,
)
from proteus_deploy.kernels.joint_attention.op import fused_attention
from proteus_deploy.kernels.joint_attention.quantised import Product, quantised_attention
from proteus_deploy.kernels.joint_attention.reference import attention, modulated_norm, rotate

__all__ = [
    "Attention",
    "Product",
    "attention",
    "attention_names",
    "attention_with",
    "check_attention_runs_on",
    "fused_attention",
    "modulated_norm",
    "quantised_attention",
    "rotate",
]
