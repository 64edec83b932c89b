"""Captions -> features that LlamaGen's decoder starts from.

Axes: B captions, P positions (`cls_token_num`), W width of the text encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proteus_deploy.errors import CheckpointError
from proteus_deploy.tokens import Tokenizer

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["CaptionEncoder"]


class CaptionEncoder:
    """A T5 encoder and its tokenizer, in the folders that transformers writes; read on first use.

    text_encoder, tokenizer: their folders (one and the same for a model as it is downloaded).
    length: P. width: what the decoder expects of the encoder.

    Raises CheckpointError then, for a folder that isn't there, can't be read or has another width.
    """

    def __init__(
        self,
        text_encoder: Path,
        tokenizer: Path,
        *,
        length: int,
        width: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self._folder, self._length, self._width, self._device = text_encoder, length, width, device
        self._tokenizer = Tokenizer(tokenizer)

    @cached_property
    def _encoder(self) -> Any:
        import torch
        from transformers import T5EncoderModel

        if not (self._folder / "config.json").is_file():
            raise CheckpointError(
                f"{self._folder} has no config.json; a T5 encoder in transformers' layout belongs there "
                "(LlamaGen's is flan-t5-xl)"
            )
        try:
            encoder = T5EncoderModel.from_pretrained(
                str(self._folder), local_files_only=True, dtype=torch.float32
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{self._folder} can't be read as a T5 encoder: {error}") from error
        if encoder.config.d_model != self._width:
            raise CheckpointError(
                f"the encoder in {self._folder} is {encoder.config.d_model} wide, but the decoder's captions "
                f"are {self._width}; LlamaGen's decoders go with flan-t5-xl, 2048 wide"
            )
        return encoder.requires_grad_(False).train(False).to(self._device)

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Features float32 [B, P, W] and which of the positions hold some, bool [B, P].

        As published: captions in lower case, padding in front and zero. Each is encoded by itself, which is
        what the mask of a padded batch amounts to. Longer ones are cut, which is logged.
        """
        import torch

        features = torch.zeros(len(captions), self._length, self._width, device=self._device)
        valid = torch.zeros(len(captions), self._length, dtype=torch.bool, device=self._device)
        for row, caption in enumerate(captions):
            ids, mask = self._tokenizer(caption.strip().lower(), self._length)
            ids = ids[:, mask[0].bool()].to(self._device)
            with torch.no_grad():
                features[row, -ids.shape[1] :] = self._encoder(input_ids=ids).last_hidden_state[0]
            valid[row, -ids.shape[1] :] = True
        return features, valid
