from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from proteus_deploy.tiny.tokenizer import EXTRA_IDS
from proteus_deploy.tokens import Tokenizer
from proteus_deploy.training.tiny_model.descriptions import prompts
from proteus_deploy.training.tiny_model.text_tokenizer import (
    MAX_LENGTH,
    PIECES,
    TABLE_ROWS,
    training_text,
    write_text_tokenizer,
)

# People whom the tokenizer was not trained on come after the first 1500.
_PEOPLE = 2000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_tokenizer(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    from transformers import T5Tokenizer

    return T5Tokenizer.from_pretrained(str(folder))


def test_every_word_of_an_avatar_is_one_piece(tokenizer: Any) -> None:
    words = {word.strip(",") for prompt in prompts(_PEOPLE) for word in prompt.split()}
    assert len(words) > 70
    cut = {word: pieces for word in words if len(pieces := tokenizer.tokenize(word)) != 1}
    assert not cut


def test_prompts_are_short(tokenizer: Any) -> None:
    found = prompts(_PEOPLE)
    lengths = [len(ids) for ids in tokenizer(found).input_ids]
    assert max(lengths) <= 36
    assert max(lengths[2::3]) <= 20  # identity prompts


def test_other_text_has_no_unknown_tokens(tokenizer: Any) -> None:
    ids = tokenizer('A Zookeeper, 42 years old: "Why not?" (yes!) - fine; it\'s OK.').input_ids
    assert tokenizer.unk_token_id not in ids


def test_the_empty_prompt_is_the_end_alone(folder: Path) -> None:
    ids, mask = Tokenizer(folder)("", 6)
    assert ids.tolist() == [[1, 0, 0, 0, 0, 0]]
    assert mask.tolist() == [[1, 0, 0, 0, 0, 0]]


def test_sentinels_end_the_table(tokenizer: Any) -> None:
    assert len(tokenizer) == PIECES + EXTRA_IDS <= TABLE_ROWS
    assert tokenizer.model_max_length == MAX_LENGTH


def test_the_same_bytes_every_time(folder: Path, tmp_path: Path) -> None:
    again = write_text_tokenizer(tmp_path)
    for name in ("spiece.model", "tokenizer_config.json"):
        assert (again / name).read_bytes() == (folder / name).read_bytes()


def test_the_training_text_holds_every_word_twice() -> None:
    # What SentencePiece sees once it cuts, however often it occurs.
    lines = training_text()
    assert {"hoodie.", "zoom", "zoom."} <= set(lines)
