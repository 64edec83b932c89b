"""Prompts -> T5 token ids, as published: padded to a fixed length, cut where they are longer."""

from __future__ import annotations

import logging
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from proteus_deploy.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

_log = logging.getLogger(__name__)


class Tokenizer:
    """The checkpoint's SentencePiece tokenizer; read on first use, and used by any number of threads.

    Raises CheckpointError then, naming the folder, when transformers can't read it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # A call writes its length and padding into the one tokenizer, where another thread would read them.
        self._lock = Lock()

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import T5Tokenizer

        if not (self._folder / "spiece.model").is_file() and not (self._folder / "tokenizer.json").is_file():
            raise CheckpointError(f"{self._folder} has neither spiece.model nor tokenizer.json")
        try:
            return T5Tokenizer.from_pretrained(str(self._folder), local_files_only=True)
        except ImportError:  # a package is missing; the message of transformers says which
            raise
        except Exception as error:  # its parsers raise anything, a bare Exception included
            raise CheckpointError(
                f"{self._folder} can't be read as a T5 tokenizer "
                f"({type(error).__name__}: {str(error)[:200]}); a file in it is damaged or incomplete: "
                "download the folder again"
            ) from error

    def __call__(self, text: str, length: int) -> tuple[Tensor, Tensor]:
        """Token ids and mask, both int64 [1, length]. A longer text is cut, which is logged once per call."""
        with self._lock:
            encoded = self._tokenizer(
                [text],
                padding="max_length",
                max_length=length,
                truncation=True,
                add_special_tokens=True,
                return_tensors="pt",
            )
            whole = len(self._tokenizer(text, add_special_tokens=True).input_ids)
        if whole > length:
            _log.warning("a text of %d tokens was cut to %d: %.60s…", whole, length, text)
        return encoded.input_ids, encoded.attention_mask
