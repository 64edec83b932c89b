"""Captions -> features that LlamaGen's decoder starts from.

Axes: B captions, P positions (`cls_token_num`), W width of the text encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from proteus_deploy.errors import CheckpointError
from proteus_deploy.tokens import Tokenizer
from proteus_deploy.weights import SafetensorsFolder, read_json

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

__all__ = ["CaptionEncoder"]

# Files hold the embedding under one of these names, or under both.
_TIED = ("shared.weight", "encoder.embed_tokens.weight")


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
        from transformers import T5Config, T5EncoderModel

        file = self._folder / "config.json"
        if not file.is_file():
            raise CheckpointError(
                f"{self._folder} has no config.json; a T5 encoder in transformers' layout belongs there "
                "(LlamaGen's is flan-t5-xl)"
            )
        config = read_json(file)
        if config.get("model_type") != "t5" or config.get("d_model") != self._width:
            raise CheckpointError(
                f"{file} is of a {config.get('model_type')} encoder, {config.get('d_model')} wide, but the "
                f"decoder's captions are a t5's, {self._width} wide; LlamaGen's go with flan-t5-xl, 2048 wide"
            )
        with torch.device("meta"):
            encoder: Any = T5EncoderModel(T5Config(**config))
        stored = SafetensorsFolder(self._folder)
        names = set(stored.keys())
        tied = next((name for name in _TIED if name in names), _TIED[0])
        wanted = {name: tied if name in _TIED else name for name in encoder.state_dict()}
        missing = sorted(set(wanted.values()) - names)
        if missing:
            raise CheckpointError(f"{self._folder} lacks {', '.join(missing[:8])}; is it another network?")
        tensors = {name: stored.tensor(source).float() for name, source in wanted.items()}
        try:
            encoder.load_state_dict(tensors, assign=True)
        except RuntimeError as error:
            raise CheckpointError(f"{self._folder} doesn't fit its own config.json: {error}") from error
        return encoder.requires_grad_(False).train(False).to(self._device)

    @property
    def network(self) -> nn.Module:
        """transformers' T5EncoderModel, float32."""
        return cast("nn.Module", self._encoder)

    def ids(self, caption: str) -> Tensor:
        """Token ids int64 [1, N] of a caption in lower case, without padding, cut at P."""
        ids, mask = self._tokenizer(caption.strip().lower(), self._length)
        return ids[:, mask[0].bool()]

    def encode(self, ids: Tensor) -> Tensor:
        """Features float32 [1, N, W] of the token ids int64 [1, N] of one caption."""
        import torch

        with torch.no_grad():
            return cast("Tensor", self._encoder(input_ids=ids).last_hidden_state)

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Features float32 [B, P, W] and which of the positions hold some, bool [B, P].

        As published: captions in lower case, padding in front and zero. Each is encoded by itself, which is
        what the mask of a padded batch amounts to. Longer ones are cut, which is logged.
        """
        import torch

        features = torch.zeros(len(captions), self._length, self._width, device=self._device)
        valid = torch.zeros(len(captions), self._length, dtype=torch.bool, device=self._device)
        for row, caption in enumerate(captions):
            ids = self.ids(caption).to(self._device)
            features[row, -ids.shape[1] :] = self.encode(ids)[0]
            valid[row, -ids.shape[1] :] = True
        return features, valid
