"""The tiny model's tokenizer: SentencePiece, trained on prompts of avatars and on general sentences.

Every word of an avatar's prompt is one piece, so that a prompt fits in few tokens; all other text is spelt in
smaller ones.
"""

from __future__ import annotations

from pathlib import Path

from proteus_deploy.tiny.tokenizer import EXTRA_IDS, sentences, train_tokenizer
from proteus_deploy.training.tiny_model.descriptions import prompts

__all__ = ["MAX_LENGTH", "PIECES", "TABLE_ROWS", "TOKENIZER_FOLDER", "training_text", "write_text_tokenizer"]

TOKENIZER_FOLDER = "tokenizer"
PIECES = 348
# Pieces and sentinels fill whole rows of 64, as T5's table does.
TABLE_ROWS = 448
MAX_LENGTH = 48

_PEOPLE = 1500
# Words that people write in prompts and that neither avatars nor the sentences have.
_FURTHER_WORDS = """
    photo video portrait picture image face mouth nose ear skin smiling happy sad angry young baby child
    people friend dress jacket suit tie skirt jeans uniform helmet necklace ring shoes running sitting
    standing walking dancing speaking singing looking wearing smiles sits runs sings eats turns raises
    hand hands arm shoulder right up down back side near far over behind around quickly softly city park
    forest sea river sky cloud sun moon day evening summer winter house office school shop car boat cat
    horse bird tree chair wall floor lamp bright cold soft big tall new good best detailed realistic
    cinematic style film movie drawing painting zoom frame silver violet there this that from into then
    when it is are very more one two three
"""


def training_text() -> list[str]:
    """Prompts of avatars and general sentences, in an order that never changes."""
    text = [*prompts(_PEOPLE), *sentences()]
    # SentencePiece takes its first pieces from what occurs in two different words. A word that occurs in no
    # other is seen by it once, however frequent, and would be cut; with a full stop behind it, it is two.
    words = sorted({word.strip(",.") for line in text for word in line.split()})
    further = _FURTHER_WORDS.split()
    return [*text, *(f"{word}." for word in words), *further, *(f"{word}." for word in further)]


def write_text_tokenizer(folder: Path) -> Path:
    """Write `folder/tokenizer/`, spiece.model and tokenizer_config.json; the same bytes every time."""
    assert PIECES + EXTRA_IDS <= TABLE_ROWS
    return train_tokenizer(
        folder / TOKENIZER_FOLDER,
        training_text(),
        pieces=PIECES,
        max_length=MAX_LENGTH,
        split_scripts=False,
    )
