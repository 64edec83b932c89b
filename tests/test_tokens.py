"""Prompts as token ids, also from several threads at once."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from proteus_deploy.tokens import Tokenizer

LENGTHS = (4, 16, 40, 7)
TEXT = "A woman with a red hat waves in front of a purple curtain"


@pytest.fixture(name="impatient")
def _impatient() -> Iterator[None]:
    """Threads change places after a microsecond of Python and not after five milliseconds."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("impatient")
def test_threads_dont_take_each_others_lengths(parity: Path) -> None:
    tokenizer = Tokenizer(parity / "checkpoint" / "tokenizer")
    alone = {length: tokenizer(TEXT, length) for length in LENGTHS}
    assert {length: tuple(ids.shape) for length, (ids, _) in alone.items()} == {
        length: (1, length) for length in LENGTHS
    }
    asked = [length for _ in range(100) for length in LENGTHS]
    with ThreadPoolExecutor(len(LENGTHS)) as pool:
        found = list(pool.map(lambda length: tokenizer(TEXT, length), asked))
    for length, (ids, mask) in zip(asked, found, strict=True):
        assert torch.equal(ids, alone[length][0])
        assert torch.equal(mask, alone[length][1])
