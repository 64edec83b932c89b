"""A portrait checkpoint: a folder with `portrait.json`, which names LlamaGen's published files and sizes.

    {
      "gpt": {"size": "GPT-XL", "model_type": "t2i", "cls_token_num": 120, "block_size": 1024},
      "vq": {"size": "VQ-16"},
      "gpt_file": "t2i_XL_stage2_512.safetensors",
      "vq_file": "vq_ds16_t2i.safetensors",
      "text_encoder": "flan-t5-xl",
      "sampling": {"guidance_scale": 7.5, "top_k": 1000}
    }

"gpt" and "vq" take the fields of `GptConfig` and `VqConfig`; "size" stands for those of a published size.
"text_encoder" and "tokenizer" are folders (the tokenizer's is the encoder's unless it is named); paths are
relative to the folder. "sampling" takes the fields of `Sampling`, "cache" those of `CacheSettings`: what is
drawn with unless something else is asked for. The authors' files are pickles; `proteus-deploy convert` makes
safetensors of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proteus_deploy._files import sha256_of
from proteus_deploy.errors import CheckpointError, InputError
from proteus_deploy.identity._weights import fill_module, read_tensors
from proteus_deploy.portrait.config import GPT_SIZES, GptConfig, VqConfig, config_from_json
from proteus_deploy.portrait.plan import CacheSettings
from proteus_deploy.portrait.sampling import Sampling
from proteus_deploy.weights import read_json

if TYPE_CHECKING:
    from torch import nn

    from proteus_deploy.portrait.captions import CaptionEncoder
    from proteus_deploy.portrait.gpt import Gpt
    from proteus_deploy.portrait.vq import VqModel

__all__ = ["DOCUMENT", "PortraitCheckpoint"]

DOCUMENT = "portrait.json"
_VQ_SIZES = {"VQ-8": (1, 2, 2, 4), "VQ-16": (1, 1, 2, 2, 4)}
_ENTRIES = {"gpt", "vq", "gpt_file", "vq_file", "text_encoder", "tokenizer", "sampling", "cache"}
# A tally of training that the published files of the tokenizer carry along.
_NOT_WEIGHTS = ("quantize.codebook_used",)


@dataclass(frozen=True)
class PortraitCheckpoint:
    """An opened checkpoint: sizes and defaults are read at once, weights when a network is built."""

    folder: Path
    gpt: GptConfig
    vq: VqConfig
    gpt_file: Path
    vq_file: Path
    text_encoder: Path | None
    tokenizer: Path | None
    sampling: Sampling
    cache: CacheSettings

    @classmethod
    def open(cls, folder: str | Path) -> PortraitCheckpoint:
        """Read `portrait.json`.

        Raises CheckpointError naming the entry at fault, or the file that is missing.
        """
        folder = Path(folder)
        file = folder / DOCUMENT
        if not file.is_file():
            raise CheckpointError(
                f"{folder} has no {DOCUMENT}; a portrait checkpoint is a folder with one (docs/portrait.md)"
            )
        found = read_json(file)
        unknown = sorted(found.keys() - _ENTRIES)
        if unknown:
            raise CheckpointError(
                f"{file} has {', '.join(unknown)}; it may have {', '.join(sorted(_ENTRIES))}"
            )
        try:
            gpt = config_from_json(GptConfig, _with_size(_entry(found, "gpt"), _gpt_size))
            vq = config_from_json(VqConfig, _with_size(_entry(found, "vq"), _vq_size))
            sampling = Sampling(**_entry(found, "sampling", {}))
            cache = CacheSettings(**_entry(found, "cache", {}))
        except (CheckpointError, InputError, TypeError) as error:
            raise CheckpointError(f"{file}: {error}") from error
        if gpt.vocab_size != vq.codebook_size:
            raise CheckpointError(
                f"{file}: the decoder knows {gpt.vocab_size} codes (vocab_size) and the tokenizer "
                f"{vq.codebook_size} (codebook_size); they have to be trained for each other"
            )
        files = {name: _path(folder, found, name) for name in ("gpt_file", "vq_file")}
        text = tokenizer = None
        if gpt.model_type == "t2i":
            text = _path(folder, found, "text_encoder")
            tokenizer = _path(folder, found, "tokenizer") if "tokenizer" in found else text
        return cls(folder, gpt, vq, files["gpt_file"], files["vq_file"], text, tokenizer, sampling, cache)

    @property
    def side(self) -> int:
        """Pixels of a portrait, across and down."""
        return self.gpt.grid_size * self.vq.downsample

    @property
    def hash(self) -> str:
        """sha256 over the files of decoder and tokenizer."""
        both = sha256_of(self.gpt_file) + sha256_of(self.vq_file)
        return hashlib.sha256(both.encode()).hexdigest()

    def build_gpt(self) -> Gpt:
        """The decoder in float32, eval mode. Raises CheckpointError where its weights don't fit."""
        import torch

        from proteus_deploy.portrait.gpt import Gpt, grid_rotary

        with torch.device("meta"):
            gpt = Gpt(self.gpt)
        _fill(gpt, self.gpt_file)
        gpt.rotary = grid_rotary(
            self.gpt.grid_size, self.gpt.head_dim, self.gpt.rope_base, self.gpt.cls_token_num
        )
        return gpt

    def build_vq(self) -> VqModel:
        """The tokenizer in float32, eval mode. Raises CheckpointError where its weights don't fit."""
        import torch

        from proteus_deploy.portrait.vq import VqModel

        with torch.device("meta"):
            vq = VqModel(self.vq)
        _fill(vq, self.vq_file)
        return vq

    def caption_encoder(self, device: str = "cpu") -> CaptionEncoder:
        """The text encoder; raises CheckpointError for a model of classes, which has none."""
        from proteus_deploy.portrait.captions import CaptionEncoder

        if self.text_encoder is None or self.tokenizer is None:
            raise CheckpointError(f"{self.folder} draws classes (c2i), not captions; choose a t2i model")
        return CaptionEncoder(
            self.text_encoder,
            self.tokenizer,
            length=self.gpt.cls_token_num,
            width=self.gpt.caption_dim,
            device=device,
        )


def _fill(module: nn.Module, file: Path) -> None:
    if file.suffix != ".safetensors":
        raise CheckpointError(
            f"{file} is no .safetensors file; make one of it: proteus-deploy convert {file}"
        )
    tensors = {key: value for key, value in read_tensors(file).items() if key not in _NOT_WEIGHTS}
    fill_module(module, tensors, file)


def _entry(found: Mapping[str, Any], name: str, default: Any = None) -> dict[str, Any]:
    entry = found.get(name, default)
    if not isinstance(entry, dict):
        raise CheckpointError(f"{name} is {entry!r}; an object belongs there")
    return dict(entry)


def _path(folder: Path, found: Mapping[str, Any], name: str) -> Path:
    entry = found.get(name)
    if not isinstance(entry, str) or not entry:
        raise CheckpointError(f"{folder / DOCUMENT}: {name} is {entry!r}; the name of a file belongs there")
    path = folder / entry
    if not path.exists():
        raise CheckpointError(f"{folder / DOCUMENT}: {name} is {entry}, but {path} does not exist")
    return path


def _with_size(entry: dict[str, Any], fields_of: Any) -> dict[str, Any]:
    return {**fields_of(entry.pop("size")), **entry} if "size" in entry else entry


def _gpt_size(size: str) -> dict[str, Any]:
    if size not in GPT_SIZES:
        raise CheckpointError(f"there is no decoder of size {size!r}; choose {', '.join(GPT_SIZES)}")
    return dict(zip(("n_layer", "n_head", "dim"), GPT_SIZES[size], strict=True))


def _vq_size(size: str) -> dict[str, Any]:
    if size not in _VQ_SIZES:
        raise CheckpointError(f"there is no tokenizer of size {size!r}; choose {', '.join(_VQ_SIZES)}")
    return {"encoder_ch_mult": _VQ_SIZES[size], "decoder_ch_mult": _VQ_SIZES[size]}
