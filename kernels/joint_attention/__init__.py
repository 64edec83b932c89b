"""Joint text-video attention: modulated norm, rotary embedding, attention over all tokens."""

from proteus_deploy.kernels.joint_attention.reference import attention, modulated_norm, rotate

__all__ = ["attention", "modulated_norm", "rotate"]
