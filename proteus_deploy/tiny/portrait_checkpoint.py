"""A portrait checkpoint in miniature, with random weights: the published layout, in an instant."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from proteus_deploy._files import atomic_directory, write_json
from proteus_deploy.portrait.checkpoint import DOCUMENT
from proteus_deploy.portrait.config import GptConfig, VqConfig
from proteus_deploy.tiny.trained import MODEL

__all__ = ["RANDOM_GPT", "RANDOM_VQ", "write_random_portrait"]

RANDOM_VQ = VqConfig(codebook_size=96, encoder_ch_mult=(1, 1), decoder_ch_mult=(1, 1), z_channels=8, ch=32)
RANDOM_GPT = GptConfig(
    dim=48,
    n_layer=2,
    n_head=3,
    multiple_of=16,
    model_type="t2i",
    caption_dim=128,  # the tiny text encoder's
    cls_token_num=32,
    vocab_size=RANDOM_VQ.codebook_size,
    block_size=64,
)


def write_random_portrait(
    folder: Path, *, seed: int = 0, gpt: GptConfig = RANDOM_GPT, vq: VqConfig = RANDOM_VQ
) -> Path:
    """Write the checkpoint to `folder`, whole or not at all; return it.

    Its captions go through the trained tiny text encoder, which stays where the package has it.
    Raises InputError where `folder` exists.
    """
    import torch
    from safetensors.torch import save_file

    from proteus_deploy.portrait.gpt import Gpt
    from proteus_deploy.portrait.vq import VqModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        networks = {"gpt": Gpt(gpt), "vq": VqModel(vq)}
    document = {
        "gpt": asdict(gpt),
        "vq": asdict(vq),
        **{f"{name}_file": f"{name}.safetensors" for name in networks},
        **{name: str(MODEL / name) for name in ("text_encoder", "tokenizer")},
        "sampling": {"guidance_scale": 2.0, "top_k": 0},
        "cache": {"policy": "adsa", "budget": 0.7},
    }
    with atomic_directory(folder) as new:
        for name, network in networks.items():
            save_file(network.state_dict(), new / f"{name}.safetensors", {"format": "pt"})
        write_json(new / DOCUMENT, document)
    return folder
