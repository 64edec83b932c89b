"""Low-rank adapters of the denoiser: one person's (PersonalVideo), or a style's."""

from proteus_deploy.adapters.adapter import Adapter, AdapterUse, TimestepGate
from proteus_deploy.adapters.files import read_adapter, save_adapter

__all__ = ["Adapter", "AdapterUse", "TimestepGate", "read_adapter", "save_adapter"]
