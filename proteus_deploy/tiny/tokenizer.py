"""A SentencePiece tokenizer in the published layout, trained by code on sentences about people and scenes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from proteus_deploy._files import atomic_file, write_json

__all__ = ["EXTRA_IDS", "PIECES", "sentences", "train_tokenizer", "write_tokenizer"]

PIECES = 192
EXTRA_IDS = 100  # T5's sentinels <extra_id_0> …; the text encoder's table has to have room for them
_REQUIRED = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,;:!?'\"()-"

_SUBJECTS = (
    "a person", "a woman", "a man", "a young woman", "an old man", "a girl", "a boy", "a doctor",
    "a teacher", "a musician", "a gardener", "a traveller", "a cook", "a painter", "a runner", "a student",
)  # fmt: skip
_LOOKS = (
    "with short dark hair", "with long brown hair", "with curly red hair", "with grey hair and a beard",
    "with round glasses", "with green eyes", "with freckles", "with a warm smile", "with a serious look",
    "wearing a blue coat", "wearing a white shirt", "wearing a straw hat", "wearing a red scarf",
)  # fmt: skip
_ACTIONS = (
    "reads a letter", "drinks a cup of tea", "plays the guitar", "walks slowly", "looks at the camera",
    "turns the head to the left", "laughs and waves", "writes in a notebook", "opens a door",
    "holds a bunch of flowers", "talks on the phone", "dances", "feeds a small dog", "rides a bicycle",
    "paints a picture", "stands still and listens", "cuts bread", "ties a shoe", "closes the eyes",
)  # fmt: skip
_PLACES = (
    "by the window", "in a sunny garden", "on a wooden bridge", "in a busy street", "at the kitchen table",
    "in front of a mountain lake", "on a beach", "in a library full of books", "under a large tree",
    "on a train", "in a small workshop", "at a market", "in the snow", "in a quiet room", "on a stage",
)  # fmt: skip
_LIGHTS = (
    "in the morning light", "at sunset", "at night under street lamps", "in soft grey light",
    "while it rains", "with golden leaves falling", "the camera moves closer", "in a close-up shot",
    "shallow depth of field", "high quality, sharp focus", "blurry, low quality, distorted",
)  # fmt: skip


def sentences() -> list[str]:
    """The training text: each part meets parts of the other lists, in an order that never changes."""
    lists = (_SUBJECTS, _LOOKS, _ACTIONS, _PLACES, _LIGHTS)
    # Lengths without a common pattern: stepping through all lists at once mixes them without repeats.
    rows = [[part[index % len(part)] for part in lists] for index in range(400)]
    text = [f"{subject} {look} {action} {place}, {light}" for subject, look, action, place, light in rows]
    return text + [sentence[:1].upper() + sentence[1:] + "." for sentence in text]


def write_tokenizer(folder: Path, *, max_length: int) -> Path:
    """Write spiece.model and tokenizer_config.json into `folder`; the same bytes every time.

    max_length: tokens of a prompt that the transformer takes.
    """
    return train_tokenizer(folder, sentences(), pieces=PIECES, max_length=max_length)


def train_tokenizer(
    folder: Path, text: Sequence[str], *, pieces: int, max_length: int, split_scripts: bool = True
) -> Path:
    """Train a T5 tokenizer of `pieces` pieces on lines of text and write it into `folder`.

    split_scripts: whether letters, digits and signs never share a piece.
    """
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_writer=model,
        model_type="unigram",
        vocab_size=pieces,
        character_coverage=1.0,
        required_chars=_REQUIRED,
        split_by_unicode_script=split_scripts,
        normalization_rule_name="nmt_nfkc",
        # T5's numbers for the special pieces; it has no beginning of sentence.
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,  # several threads add up counts in an order that changes
        minloglevel=2,
    )
    with atomic_file(folder / "spiece.model") as temporary:
        temporary.write_bytes(model.getvalue())
    document = {
        "tokenizer_class": "T5Tokenizer",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "extra_ids": EXTRA_IDS,
        "additional_special_tokens": [f"<extra_id_{index}>" for index in range(EXTRA_IDS)],
        "model_max_length": max_length,
        "legacy": True,
    }
    write_json(folder / "tokenizer_config.json", document)
    return folder
