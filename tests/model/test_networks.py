"""Networks: every published key belongs to exactly one stage, and parameters load in their precision."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from proteus_deploy.checkpoint import Checkpoint
from proteus_deploy.model.layers import sinusoid
from proteus_deploy.model.networks import transformer_networks
from proteus_deploy.network_factory import NetworkFactory


def test_the_transformers_keys_are_split_over_its_stages(parity: Path) -> None:
    published = load_file(parity / "checkpoint/transformer/diffusion_pytorch_model.safetensors")
    networks = transformer_networks(Checkpoint.open(parity / "checkpoint").transformer, folded=True)
    assert set(networks) == {"identity_fusion", "identity_schedule", "denoiser"}
    keys = [key for network in networks.values() for key in network.state_dict()]
    assert len(keys) == len(set(keys))
    assert set(keys) == set(published)


def test_networks_are_built_without_memory(parity: Path) -> None:
    build = NetworkFactory(Checkpoint.open(parity / "checkpoint"))
    for graph in ("denoiser", "vae_encoder", "vae_decoder_first_3", "text_encoder"):
        assert all(value.is_meta for value in build(graph).module.parameters()), graph


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_are_read_as_asked(parity: Path, dtype: torch.dtype) -> None:
    build = NetworkFactory(Checkpoint.open(parity / "checkpoint"))
    for graph in ("denoiser", "vae_decoder_next", "text_encoder"):
        module = build(graph).materialise(dtype)
        assert not module.training
        for name, value in module.named_parameters():
            assert not value.requires_grad
            # T5's feed-forward output overflows half precision, so it stays in float32 there.
            wide = dtype == torch.float16 and name.endswith("wo.weight")
            assert value.dtype == (torch.float32 if wide else dtype), name


def test_no_module_keeps_a_tensor_without_memory(parity: Path) -> None:
    build = NetworkFactory(Checkpoint.open(parity / "checkpoint"))
    for graph in ("identity_fusion", "identity_schedule", "denoiser", "vae_encoder", "text_encoder"):
        module: nn.Module = build(graph).materialise(torch.float32)
        assert not any(value.is_meta for value in (*module.parameters(), *module.buffers())), graph


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("shift", [0.0, 1.0])
@pytest.mark.parametrize("channels", [4, 96, 3072])
def test_sinusoid_is_diffusers_to_the_last_bit(channels: int, flip: bool, shift: float) -> None:
    from diffusers.models.embeddings import get_timestep_embedding

    times = torch.tensor([0, 1, 500, 999])
    want = get_timestep_embedding(times, channels, flip_sin_to_cos=flip, downscale_freq_shift=shift)
    assert torch.equal(sinusoid(times, channels, flip_sin_to_cos=flip, freq_shift=shift), want)
