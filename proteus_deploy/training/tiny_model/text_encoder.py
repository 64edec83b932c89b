"""The tiny model's T5 encoder, trained to fill in masked words and to tell who and what a prompt names.

Each word must also know its neighbours: else "red" would not say whether it is the hair's or the hoodie's.

T5 as published never masks padding: its states depend on the length that a prompt is padded to. So training
pads to the lengths that the pipeline uses. Axes: B prompts, L tokens, W width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from proteus_deploy._files import atomic_file, write_json
from proteus_deploy.errors import InputError
from proteus_deploy.reporting import Report, no_report
from proteus_deploy.tiny.tokenizer import sentences
from proteus_deploy.training.avatars import training_seed
from proteus_deploy.training.tiny_model.attribute_heads import (
    AttributeHeads,
    label_table,
    same_first_weights,
)
from proteus_deploy.training.tiny_model.descriptions import (
    ATTRIBUTES,
    UNKNOWN,
    describe_clip,
    describe_photo,
    written_labels,
)
from proteus_deploy.training.tiny_model.fitting import FitSettings, fit
from proteus_deploy.training.tiny_model.text_tokenizer import (
    TABLE_ROWS,
    TOKENIZER_FOLDER,
    write_text_tokenizer,
)

if TYPE_CHECKING:
    from transformers import T5EncoderModel

__all__ = [
    "IDENTITY_TOKENS",
    "TEXT_ENCODER_FOLDER",
    "TEXT_WIDTH",
    "FrozenText",
    "text_encoder_config",
    "train_text_encoder",
]

TEXT_ENCODER_FOLDER = "text_encoder"
TEXT_WIDTH = 128
# Lengths that prompts are padded to: identity prompts, then whole ones beside and without identity tokens.
IDENTITY_TOKENS = 20
_PROMPT_TOKENS = (36, 48)
_PEOPLE = 4000
_BATCH = 64
_MASKED_SHARE = 0.25
_MASK = TABLE_ROWS - 1  # <extra_id_0>
_PAD, _END = 0, 1
_SCENE = ("garment", "clothes", "place", "background", "motion")


def text_encoder_config() -> dict[str, Any]:
    """config.json of the text encoder, as transformers writes it for T5 v1.1."""
    return {
        "architectures": ["T5EncoderModel"],
        "classifier_dropout": 0.0,
        "d_ff": 256,
        "d_kv": 32,
        "d_model": TEXT_WIDTH,
        "dense_act_fn": "gelu_new",
        "dropout_rate": 0.0,
        "dtype": "float16",
        "eos_token_id": _END,
        "feed_forward_proj": "gated-gelu",
        "initializer_factor": 1.0,
        "is_decoder": False,
        "is_encoder_decoder": False,
        "is_gated_act": True,
        "layer_norm_epsilon": 1e-06,
        "model_type": "t5",
        "num_decoder_layers": 3,
        "num_heads": 4,
        "num_layers": 3,
        "pad_token_id": _PAD,
        "relative_attention_max_distance": 128,
        "relative_attention_num_buckets": 32,
        "scale_decoder_outputs": True,
        "tie_word_embeddings": True,
        "use_cache": False,
        "vocab_size": TABLE_ROWS,
    }


def train_text_encoder(
    folder: Path, *, steps: int = 1000, report: Report = no_report, cancel: Event | None = None
) -> Path:
    """Write `folder/tokenizer/` and `folder/text_encoder/` and return the latter.

    States of the training lie in `folder/fits/`. Raises as `fit` does.
    """
    tokenizer = write_text_tokenizer(folder)
    with same_first_weights(1):
        network = _Trained()
    data = _Prompts.of_training_people(tokenizer, _PEOPLE)

    def loss(_: int, generator: Generator) -> tuple[Tensor, Mapping[str, float]]:
        return network.loss(*data.draw(generator), generator)

    settings = FitSettings(steps=steps, learning_rate=2e-3, seed=1)
    fit(network, loss, settings, folder=folder / "fits", name="text_encoder", report=report, cancel=cancel)
    return _write(folder / TEXT_ENCODER_FOLDER, network)


class FrozenText:
    """The trained tokenizer and encoder, for networks that learn to agree with them."""

    def __init__(self, folder: Path) -> None:
        """Read `folder/tokenizer` and `folder/text_encoder`; raises InputError when they aren't there."""
        from safetensors.torch import load_file
        from transformers import T5Config, T5EncoderModel, T5Tokenizer

        weights = folder / TEXT_ENCODER_FOLDER / "model.safetensors"
        if not weights.is_file():
            raise InputError(f"{weights} does not exist; train the text encoder first (train_text_encoder)")
        self._tokenizer = T5Tokenizer.from_pretrained(str(folder / TOKENIZER_FOLDER), local_files_only=True)
        self._encoder: Any = T5EncoderModel(T5Config(**text_encoder_config()))
        tensors = {key: value.float() for key, value in load_file(weights).items()}
        tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"]
        self._encoder.load_state_dict(tensors)
        self._encoder.requires_grad_(False).train(False)

    @torch.no_grad()
    def states(self, texts: Sequence[str], length: int = IDENTITY_TOKENS) -> Tensor:
        """float32 [B, length, W]: padded and cut to `length`, every token attending to every other."""
        ids = _token_ids(self._tokenizer, texts, length)
        found = [_states(self._encoder, chunk) for chunk in ids.split(512)]
        return torch.cat(found)


class _Trained(nn.Module):
    """The encoder and the heads that teach it."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import T5Config, T5EncoderModel

        self.t5 = T5EncoderModel(T5Config(**text_encoder_config()))
        self.attributes = AttributeHeads(TEXT_WIDTH, [name for name in ATTRIBUTES if name != "face shape"])
        self.before = nn.Linear(TEXT_WIDTH, TEXT_WIDTH)
        self.after = nn.Linear(TEXT_WIDTH, TEXT_WIDTH)

    def loss(self, ids: Tensor, labels: Tensor, generator: Generator) -> tuple[Tensor, Mapping[str, float]]:
        """ids: int64 [B, L]; labels: int64 [B, A]. Half of the prompts get masks, the others name things."""
        half = len(ids) // 2
        hidden = (torch.rand(ids.shape, generator=generator) < _MASKED_SHARE) & (ids != _PAD)
        hidden[half:] = False
        states = _states(self.t5, ids.masked_fill(hidden, _MASK))
        masked = self._entropy(states, ids, hidden)
        whole, whole_ids = states[half:], ids[half:]
        real = whole_ids != _PAD
        kept = self._entropy(whole, whole_ids, real)
        both = real[:, 1:]  # a word and the one before it
        before = self._entropy(self.before(whole[:, 1:]), whole_ids[:, :-1], both)
        after = self._entropy(self.after(whole[:, :-1]), whole_ids[:, 1:], both)
        pooled = _mean_state(whole, whole_ids)
        named = self.attributes.loss(pooled, labels[half:])
        details = {
            "masked": float(masked.detach()),
            "kept": float(kept.detach()),
            "before": float(before.detach()),
            "after": float(after.detach()),
        }
        accuracies = self.attributes.accuracies(pooled, labels[half:])
        right = [value for value in accuracies.values() if value == value]  # noqa: PLR0124 - NaN is left out
        details |= {"attributes": float(named.detach()), "right": sum(right) / max(1, len(right))}
        return 0.5 * masked + 0.2 * kept + 0.5 * (before + after) + 8 * named, details

    def _entropy(self, states: Tensor, ids: Tensor, counted: Tensor) -> Tensor:
        """Mean cross entropy where `counted` [B, L]; predicted by the embeddings, scaled as T5 does it."""
        if not counted.any():
            return states.new_zeros(())
        logits = (states[counted] * TEXT_WIDTH**-0.5) @ self.t5.shared.weight.T
        return functional.cross_entropy(logits, ids[counted])


@dataclass(frozen=True)
class _Prompts:
    """Token ids of identity prompts [N, 20] and whole prompts [M, 48], with their labels."""

    identity_ids: Tensor
    identity_labels: Tensor
    ids: Tensor
    labels: Tensor

    @classmethod
    def of_training_people(cls, tokenizer_folder: Path, people: int) -> _Prompts:
        from transformers import T5Tokenizer

        tokenizer = T5Tokenizer.from_pretrained(str(tokenizer_folder), local_files_only=True)
        seeds = [training_seed(index) for index in range(people)]
        clips = [describe_clip(seed, index % 4) for index, seed in enumerate(seeds)]
        photos = [describe_photo(seed, 0) for seed in seeds]
        identity_prompts = [clip.identity_prompt for clip in clips]
        nothing = dict.fromkeys(ATTRIBUTES, UNKNOWN)
        written = [written_labels(clip) for clip in clips]
        # General sentences keep words alive that no avatar's prompt has; the empty prompt serves guidance.
        other = [*sentences(), *[""] * (people // 20)]
        return cls(
            identity_ids=_token_ids(tokenizer, identity_prompts, IDENTITY_TOKENS),
            identity_labels=label_table(row | dict.fromkeys(_SCENE, UNKNOWN) for row in written),
            ids=_token_ids(tokenizer, [d.prompt for d in (*clips, *photos)] + other, max(_PROMPT_TOKENS)),
            labels=label_table(
                [*written, *(written_labels(photo) for photo in photos), *[nothing] * len(other)]
            ),
        )

    def draw(self, generator: Generator) -> tuple[Tensor, Tensor]:
        """Token ids [B, L] of one batch, all padded to the same length, and labels [B, A]."""
        kind = int(torch.randint(4, (), generator=generator))
        if kind == 0:
            chosen = torch.randint(len(self.identity_ids), (_BATCH,), generator=generator)
            return self.identity_ids[chosen], self.identity_labels[chosen]
        length = _PROMPT_TOKENS[kind % len(_PROMPT_TOKENS)]
        chosen = torch.randint(len(self.ids), (_BATCH,), generator=generator)
        return self.ids[chosen, :length], self.labels[chosen]


def _token_ids(tokenizer: Any, texts: Sequence[str], length: int) -> Tensor:
    encoded = tokenizer(
        list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    )
    ids: Tensor = encoded.input_ids
    return ids


def _states(t5: T5EncoderModel, ids: Tensor) -> Tensor:
    states: Tensor = t5(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    return states


def _mean_state(states: Tensor, ids: Tensor) -> Tensor:
    """Mean over the words of each prompt, [B, W]."""
    real = (ids != _PAD)[..., None]
    return (states * real).sum(dim=1) / real.sum(dim=1)


def _write(folder: Path, network: _Trained) -> Path:
    from safetensors.torch import save_file

    tensors = {
        key: value.to(torch.float16).contiguous()
        for key, value in sorted(network.t5.state_dict().items())
        if key != "encoder.embed_tokens.weight"  # tied: files hold it once, as shared.weight
    }
    with atomic_file(folder / "model.safetensors") as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    write_json(folder / "config.json", text_encoder_config())
    return folder
