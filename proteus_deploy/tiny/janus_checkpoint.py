"""A Janus checkpoint in miniature, with random weights: transformers' layout, in an instant.

config.json, generation_config.json, model.safetensors
tokenizer.json, tokenizer_config.json, chat_template.jinja
preprocessor_config.json, processor_config.json    for transformers' own processor
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from proteus_deploy._files import atomic_directory, atomic_file, write_json
from proteus_deploy.tiny.tokenizer import sentences

if TYPE_CHECKING:
    from transformers import JanusForConditionalGeneration

__all__ = ["write_random_janus"]

_GRID = 8
_CODES = 96
_WIDTH = 64
_PIECES = 384
# The names that Janus' tokenizer has for them; their place in the list is their number.
_BOS, _EOS, _PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
_IMAGE, _BOI, _EOI = "<image_placeholder>", "<begin_of_image>", "<end_of_image>"
_SPECIAL = [_BOS, _EOS, _PAD, _IMAGE, _BOI, _EOI, "<|User|>", "<|Assistant|>"]
# A user's turn as Janus was trained on it, and the beginning of the answer.
_CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{ '<|User|>: ' if message['role'] == 'user' else '<|Assistant|>: ' }}
{%- for part in message['content'] if part['type'] == 'text' -%}{{ part['text'].strip() }}{%- endfor -%}
{{ '\\n\\n' if message['role'] == 'user' else '<｜end▁of▁sentence｜>' }}
{%- endfor -%}
{{ '<|Assistant|>:' if add_generation_prompt else '' }}"""


def write_random_janus(folder: Path, *, seed: int = 0) -> Path:
    """Write the checkpoint to `folder`, whole or not at all; return it.

    Its pictures have 8 x 8 tokens and 16 pixels a side.
    Raises InputError where `folder` exists.
    """
    from safetensors.torch import save_file

    model = _model(seed)
    # The weight of the language model's head is that of its embedding, which files hold once.
    state = {name: one for name, one in model.state_dict().items() if name != "lm_head.weight"}
    with atomic_directory(folder) as new:
        save_file(state, new / "model.safetensors", {"format": "pt"})
        config = model.config.to_dict()
        write_json(new / "config.json", {**config, "architectures": [type(model).__name__]})
        write_json(
            new / "generation_config.json",
            {
                "bos_token_id": _SPECIAL.index(_BOS),
                "eos_token_id": _SPECIAL.index(_EOS),
                "pad_token_id": _SPECIAL.index(_PAD),
                "guidance_scale": 5,
                "temperature": 1,
                "generation_kwargs": {"boi_token_id": _SPECIAL.index(_BOI)},
            },
        )
        _write_tokenizer(new)
        write_json(
            new / "preprocessor_config.json",
            {
                "image_processor_type": "JanusImageProcessor",
                "image_mean": [0.5, 0.5, 0.5],
                "image_std": [0.5, 0.5, 0.5],
                "size": {"height": 2 * _GRID, "width": 2 * _GRID},
            },
        )
        write_json(
            new / "processor_config.json",
            {"processor_class": "JanusProcessor", "num_image_tokens": _GRID**2},
        )
    return folder


def _model(seed: int) -> JanusForConditionalGeneration:
    import torch
    from transformers import (
        JanusConfig,
        JanusForConditionalGeneration,
        JanusVisionConfig,
        JanusVQVAEConfig,
        LlamaConfig,
    )

    config = JanusConfig(
        text_config=LlamaConfig(
            vocab_size=_PIECES,
            hidden_size=_WIDTH,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=1024,
            bos_token_id=_SPECIAL.index(_BOS),
            eos_token_id=_SPECIAL.index(_EOS),
            pad_token_id=_SPECIAL.index(_PAD),
        ),
        vision_config=JanusVisionConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=2 * _GRID,
            patch_size=2,
            projection_dim=_WIDTH,
            mlp_ratio=1.0,
            depth=1,
            num_image_tokens=_GRID**2,
        ),
        vq_config=JanusVQVAEConfig(
            embed_dim=8,
            num_embeddings=_CODES,
            latent_channels=16,
            base_channels=32,  # transformers normalises by 32 groups of channels
            channel_multiplier=[1, 1],
            num_res_blocks=1,
            projection_dim=_WIDTH,
            image_token_embed_dim=_WIDTH,
        ),
        image_token_id=_SPECIAL.index(_IMAGE),
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = JanusForConditionalGeneration(config)
        # With transformers' small random weights, every prompt would give one and the same token.
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "vision_model" not in name and "vqmodel" not in name:
                weight.normal_(std=weight.shape[1] ** -0.5 if "embed" not in name else 1.0)
    return model


def _write_tokenizer(folder: Path) -> None:
    """Byte-level pairs, as Janus has, from the sentences of the other tiny models."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_PIECES,
        special_tokens=_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{_BOS} $A", special_tokens=[(_BOS, _SPECIAL.index(_BOS))]
    )
    with atomic_file(folder / "tokenizer.json") as temporary:
        tokenizer.save(str(temporary))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "LlamaTokenizerFast",  # as published, though it is byte-level
            "bos_token": _BOS,
            "eos_token": _EOS,
            "pad_token": _PAD,
            "image_token": _IMAGE,
            "boi_token": _BOI,
            "eoi_token": _EOI,
            "extra_special_tokens": {"image_token": _IMAGE, "boi_token": _BOI, "eoi_token": _EOI},
            "model_max_length": 16384,
        },
    )
    (folder / "chat_template.jinja").write_text(_CHAT_TEMPLATE, encoding="utf-8")
