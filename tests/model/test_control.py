"""The control network beside one put together from diffusers' parts, as the published ones are."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from proteus_deploy.checkpoint import Checkpoint
from proteus_deploy.errors import CheckpointError
from proteus_deploy.model.control_config import read_control_config
from proteus_deploy.model.transformer import rotary_tables
from proteus_deploy.network_factory import NetworkFactory
from proteus_deploy.tiny.controlnet import write_tiny_controlnet

WEIGHTS = "diffusion_pytorch_model.safetensors"


class Published(nn.Module):
    """Frame by frame as the published pipeline runs it, with time folded by `avg_pool1d`."""

    def __init__(self, config: dict[str, Any]) -> None:
        from diffusers.models.embeddings import CogVideoXPatchEmbed, TimestepEmbedding, Timesteps
        from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock

        super().__init__()
        heads, head, time = (
            config[name] for name in ("num_attention_heads", "attention_head_dim", "time_embed_dim")
        )
        width, channels = heads * head, config["in_channels"] * config["downscale_coef"] ** 2
        self.unshuffle = nn.PixelUnshuffle(config["downscale_coef"])
        self.controlnet_encode_first = self._encode(channels, channels // 2)
        self.controlnet_encode_second = self._encode(channels // 2, channels // 4)
        self.patch_embed = CogVideoXPatchEmbed(
            patch_size=config["patch_size"],
            in_channels=config["vae_channels"] + channels // 4,
            embed_dim=width,
            text_embed_dim=config["text_embed_dim"],
            bias=True,
            use_positional_embeddings=False,
            use_learned_positional_embeddings=False,
        )
        self.time_proj = Timesteps(width, config["flip_sin_to_cos"], config["freq_shift"])
        self.time_embedding = TimestepEmbedding(width, time, "silu")
        self.transformer_blocks = nn.ModuleList(
            CogVideoXBlock(width, heads, head, time, attention_bias=config["attention_bias"])
            for _ in range(config["num_layers"])
        )
        out = config["out_proj_dim"]
        self.out_projectors = nn.ModuleList(
            nn.Linear(width, out) for _ in range(config["num_layers"]) if out is not None
        )

    @staticmethod
    def _encode(channels: int, out: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(channels, out, 1), nn.GroupNorm(2, out), nn.ReLU())

    def encode(self, video: Tensor) -> Tensor:
        """[B, F, 3, H, W] -> [B, f, c, h, w]."""
        rows = []
        for frames in video:
            x = self._halve(self.controlnet_encode_first(self.unshuffle(frames)))
            rows.append(self._halve(self.controlnet_encode_second(x)))
        return torch.stack(rows)

    @staticmethod
    def _halve(frames: Tensor) -> Tensor:
        """The first frame as it is, the others in pairs."""
        rest = frames[1:].permute(1, 2, 3, 0).flatten(0, 2)
        pooled = F.avg_pool1d(rest, 2).unflatten(0, frames.shape[1:]).permute(3, 0, 1, 2)
        return torch.cat((frames[:1], pooled))

    def forward(
        self, latents: Tensor, video: Tensor, text: Tensor, timestep: Tensor, rotary: Any
    ) -> list[Tensor]:
        time = self.time_embedding(self.time_proj(timestep))
        tokens = self.patch_embed(text, torch.cat((latents, self.encode(video)), dim=2))
        text, tokens = tokens[:, : text.shape[1]], tokens[:, text.shape[1] :]
        found = []
        for index, block in enumerate(self.transformer_blocks):
            tokens, text = block(tokens, text, time, rotary)
            found.append(self.out_projectors[index](tokens) if len(self.out_projectors) else tokens)
        return found


@pytest.mark.parametrize("heads", [None, 2])
@torch.no_grad()
def test_as_published(parity: Path, tmp_path: Path, heads: int | None) -> None:
    folder = write_tiny_controlnet(tmp_path / "control", parity / "checkpoint", heads=heads)
    reference = Published(json.loads((folder / "config.json").read_text()))
    reference.load_state_dict(load_file(folder / WEIGHTS))
    checkpoint = Checkpoint.open(parity / "checkpoint", controlnet=folder)
    networks = NetworkFactory(checkpoint)
    encoder, network = (
        networks(name).materialise(torch.float32) for name in ("control_encoder", "controlnet")
    )
    video, latents = torch.rand(1, 9, 3, 32, 48) * 2 - 1, torch.randn(2, 3, 16, 4, 6)
    text, timestep = torch.randn(2, 40, 64), torch.tensor([999, 3])
    cos, sin = rotary_tables(checkpoint.transformer.backbone, 3, 2, 3)

    expected = reference.encode(video)
    encoded = encoder(torch.cat((video[:, :1].expand(-1, 3, -1, -1, -1), video), dim=1))
    assert encoded.shape == (1, 3, 48, 4, 6)
    assert (encoded - expected).abs().max() < 1e-5

    tables = (cos.flatten(0, 2), sin.flatten(0, 2))
    wanted = reference(latents, video.expand(2, -1, -1, -1, -1), text, timestep, tables)
    found = network(latents, encoded.expand(2, -1, -1, -1, -1), text, timestep, cos, sin)
    for own, residual in zip(found, wanted, strict=True):
        assert own.shape == (2, 3, 2, 3, 96)
        assert residual.std() > 0.1
        assert (own.flatten(1, 3) - residual).abs().max() < 1e-4 * residual.abs().max()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "SparseControl"}, "this project loads CogVideoXControlnet"),
        ({"num_layers": 5}, "num_layers is 5, and the denoiser has 4 blocks"),
        ({"num_attention_heads": 4}, "width .* is 128; this checkpoint's denoiser needs 96"),
        ({"out_proj_dim": 64}, "width .* is 64; this checkpoint's denoiser needs 96"),
        ({"use_rotary_positional_embeddings": False}, "use_rotary_positional_embeddings is False"),
        ({"text_embed_dim": None}, "text_embed_dim"),
        ({"vae_channels": 4}, "vae_channels is 4; this checkpoint's denoiser needs 16"),
        ({"downscale_coef": 4}, "downscale_coef is 4"),
        ({"num_layers": "two"}, "'num_layers' is 'two'; expected int"),
        ({"in_channels": 1}, "in_channels is 1; this checkpoint's denoiser needs 3"),
        ({"use_learned_positional_embeddings": True}, "use_learned_positional_embeddings is True"),
        ({"temporal_compression_ratio": 8}, "temporal_compression_ratio is 8"),
        ({"activation_fn": "gelu"}, "'activation_fn' is 'gelu'; only 'gelu-approximate'"),
        ({"norm_elementwise_affine": False}, "'norm_elementwise_affine' is False"),
    ],
)
def test_configs_that_do_not_fit(parity: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = write_tiny_controlnet(tmp_path / "control", parity / "checkpoint")
    document = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(document | changes))
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(parity / "checkpoint", controlnet=folder)


def test_weights_that_do_not_fit(parity: Path, tmp_path: Path) -> None:
    folder = write_tiny_controlnet(tmp_path / "control", parity / "checkpoint")
    networks = NetworkFactory(Checkpoint.open(parity / "checkpoint", controlnet=folder))
    weights = load_file(folder / WEIGHTS)
    dropped = weights.pop("controlnet_encode_second.1.bias")
    save_file(weights, folder / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"controlnet_encode_second\.1\.bias"):
        networks("controlnet")  # files are checked as a whole
    save_file({**weights, "controlnet_encode_second.1.bias": dropped[1:]}, folder / WEIGHTS)
    with pytest.raises(CheckpointError, match="47"):
        networks("control_encoder")
    (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickle"):
        networks("controlnet")


def test_denoisers_that_take_none(make_checkpoint: Any, tmp_path: Path) -> None:
    for name, change in (("1.5", {"patch_size_t": 2}), ("2b", {"use_rotary_positional_embeddings": False})):
        with pytest.raises(CheckpointError, match=r"CogVideoX 1\.0 with rotary positions"):
            write_tiny_controlnet(tmp_path / f"control-{name}", make_checkpoint(name, **change))


def test_the_published_form_of_a_config(parity: Path, tmp_path: Path) -> None:
    """It says nothing of the text's width, which is T5-XXL's, and older ones nothing of a projection."""
    folder = write_tiny_controlnet(tmp_path / "control", parity / "checkpoint")
    document = json.loads((folder / "config.json").read_text())
    del document["text_embed_dim"], document["out_proj_dim"]
    own = Checkpoint.open(parity / "checkpoint").transformer
    with pytest.raises(CheckpointError, match="text_embed_dim is 4096; this checkpoint's denoiser needs 64"):
        read_control_config(document, own)
    large = replace(own, backbone=replace(own.backbone, text_embed_dim=4096))
    config = read_control_config(document, large)
    assert (config.backbone.text_embed_dim, config.projected, config.out_dim) == (4096, False, 96)
