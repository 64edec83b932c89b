"""The tiny model's CLIP, for CLIPScore: which prompt belongs to a frame, down to single colours.

Of every prompt a second one is made in which one colour is another; it's the wrong answer that is nearest to
the right one. Axes: B frames with a prompt each, T tokens, S side of the image.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from proteus_deploy._files import atomic_directory, atomic_file, write_json
from proteus_deploy.reporting import Report, no_report
from proteus_deploy.training.avatars import training_seed
from proteus_deploy.training.tiny_model.attribute_heads import (
    AttributeHeads,
    label_table,
    same_first_weights,
)
from proteus_deploy.training.tiny_model.descriptions import (
    ATTRIBUTES,
    Description,
    attribute_labels,
    describe_clip,
    written_labels,
)
from proteus_deploy.training.tiny_model.drawn_clips import draw_clips
from proteus_deploy.training.tiny_model.fitting import FitSettings, fit
from proteus_deploy.training.tiny_model.text_tokenizer import training_text

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["CLIP_FOLDER", "clip_config", "learn_merges", "train_clip", "write_clip_tokenizer"]

CLIP_FOLDER = "clip"
_CLIPS = 2400
_BATCH = 64
_SIDE, _PATCH, _WIDTH, _SHARED = 64, 8, 96, 64
_MERGES = 420
_MAX_TOKENS = 77
_START, _END = "<|startoftext|>", "<|endoftext|>"
_WORD_END = "</w>"
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)
_COLOURED = ("clothes", "background", "hair colour")
# A single frame shows no motion; a raised arm is the exception.
_SEEN = tuple(name for name in ATTRIBUTES if name not in ("motion", "face shape"))


def clip_config(vocabulary: int) -> dict[str, Any]:
    """config.json as transformers has it for CLIP. The last two of the `vocabulary` are start and end."""
    start, end = vocabulary - 2, vocabulary - 1
    common = {"hidden_size": _WIDTH, "num_attention_heads": 3, "projection_dim": _SHARED}
    return {
        "architectures": ["CLIPModel"],
        "dtype": "float16",
        "logit_scale_init_value": 2.6592,
        "model_type": "clip",
        "projection_dim": _SHARED,
        "text_config": {
            **common,
            "bos_token_id": start,
            "eos_token_id": end,
            "intermediate_size": 2 * _WIDTH,
            "max_position_embeddings": _MAX_TOKENS,
            "model_type": "clip_text_model",
            "num_hidden_layers": 3,
            "pad_token_id": end,
            "vocab_size": vocabulary,
        },
        "vision_config": {
            **common,
            "image_size": _SIDE,
            "intermediate_size": 256,
            "model_type": "clip_vision_model",
            "num_hidden_layers": 4,
            "patch_size": _PATCH,
        },
    }


def train_clip(
    folder: Path,
    *,
    steps: int = 800,
    clips: Path | None = None,
    report: Report = no_report,
    cancel: Event | None = None,
) -> Path:
    """Write `folder/clip/`, as transformers reads it, and return it.

    clips: the folder of `draw_clips`; `folder/clips/` without it. States of the training lie in
    `folder/fits/`. Raises as `fit` does.
    """
    frames, _ = draw_clips(clips or folder / "clips", _CLIPS, report=report)
    descriptions = [describe_clip(training_seed(index), 0) for index in range(len(frames))]
    labels = label_table(attribute_labels(description) for description in descriptions)
    written = label_table(written_labels(description) for description in descriptions)
    tokenizer = _tokenizer()
    with same_first_weights(7):
        network = _Trained(len(tokenizer))

    def loss(_: int, generator: Generator) -> tuple[Tensor, Mapping[str, float]]:
        chosen = torch.randperm(len(frames), generator=generator)[:_BATCH]
        pixels = _pixels(frames, chosen, generator)
        right = [descriptions[index] for index in chosen.tolist()]
        wrong = [_recoloured(description, generator) for description in right]
        ids = tokenizer([d.prompt for d in (*right, *wrong)], padding=True, return_tensors="pt").input_ids
        return network.loss(pixels, ids, labels[chosen], written[chosen])

    settings = FitSettings(steps=steps, learning_rate=1.5e-3, weight_decay=0.02, seed=7)
    fit(network, loss, settings, folder=folder / "fits", name="clip", report=report, cancel=cancel)
    return _write(folder / CLIP_FOLDER, network.clip)


class _Trained(nn.Module):
    """CLIP and the heads that help it to start."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        from transformers import CLIPConfig, CLIPModel

        self.clip: Any = CLIPModel(CLIPConfig.from_dict(clip_config(vocabulary)))
        self.of_frame = AttributeHeads(_WIDTH, _SEEN)
        self.of_text = AttributeHeads(_WIDTH, _SEEN)

    def loss(
        self, pixels: Tensor, ids: Tensor, labels: Tensor, written: Tensor
    ) -> tuple[Tensor, Mapping[str, float]]:
        """pixels: float [B, 3, S, S]; ids: int64 [2 B, T], the right prompts and then the recoloured ones;
        labels, written: int64 [B, A], what is seen and what the right prompt says.
        """
        count = len(pixels)
        seen = self.clip.vision_model(pixel_values=pixels).pooler_output
        # The end token comes before all padding, and attention is causal: no mask is needed.
        read = self.clip.text_model(input_ids=ids).pooler_output
        images = functional.normalize(self.clip.visual_projection(seen), dim=1)
        texts = functional.normalize(self.clip.text_projection(read), dim=1)
        logits = self.clip.logit_scale.clamp(max=4.6).exp() * images @ texts.T
        right = torch.arange(count)
        of_frames = functional.cross_entropy(logits, right)
        of_texts = functional.cross_entropy(logits[:, :count].T, right)
        heads = self.of_frame.loss(seen, labels) + self.of_text.loss(read[:count], written)
        own = logits.diagonal()
        details = {
            "of_frames": float(of_frames.detach()),
            "of_texts": float(of_texts.detach()),
            "heads": float(heads.detach()) / 2,
            "over_recoloured": float((own > logits[:, count:].diagonal()).float().mean()),
            "right": float((logits.argmax(dim=1) == right).float().mean()),
        }
        return of_frames + of_texts + heads, details


def learn_merges(words: Mapping[str, int], count: int) -> list[tuple[str, str]]:
    """The first `count` merges of byte pair encoding; `words` has each word's number of occurrences.

    The last letter of a word carries CLIP's end mark. Pairs that are equally frequent come in the order of
    their letters, so the result depends on the words alone.
    """
    spelt = [([*word[:-1], word[-1] + _WORD_END], number) for word, number in sorted(words.items())]
    merges: list[tuple[str, str]] = []
    while len(merges) < count:
        pairs: Counter[tuple[str, str]] = Counter()
        for pieces, number in spelt:
            for pair in pairwise(pieces):
                pairs[pair] += number
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for pieces, _ in spelt:
            place = 0
            while place < len(pieces) - 1:
                if (pieces[place], pieces[place + 1]) == best:
                    pieces[place : place + 2] = ["".join(best)]
                place += 1
    return merges


def write_clip_tokenizer(folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json into `folder`; the same bytes every time."""
    _tokenizer().save_pretrained(str(folder))


def _tokenizer() -> Any:
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    bytes_ = sorted(ByteLevel.alphabet())
    # Any: annotated as strings, but pairs are what it takes.
    merges: Any = learn_merges(Counter(_letters(training_text())), _MERGES)
    pieces = [*bytes_, *(byte + _WORD_END for byte in bytes_), *("".join(pair) for pair in merges)]
    pieces += [_START, _END]
    assert len(set(pieces)) == len(pieces)
    return CLIPTokenizer(
        vocab={piece: number for number, piece in enumerate(pieces)},
        merges=merges,
        model_max_length=_MAX_TOKENS,
    )


def _letters(lines: Iterable[str]) -> list[str]:
    """Runs of letters, as CLIP cuts text before it looks for pieces."""
    return ["".join(run) for line in lines for run in _runs(line.lower())]


def _runs(line: str) -> list[str]:
    return "".join(letter if letter.isalpha() else " " for letter in line).split()


def _recoloured(description: Description, generator: Generator) -> Description:
    """The description with one other colour; a bald head has none."""
    coloured = _COLOURED[:2] if description.identity.hair_style == "bald" else _COLOURED
    attribute = coloured[_drawn(len(coloured), generator)]
    present = ATTRIBUTES[attribute][attribute_labels(description)[attribute]]
    others = [colour for colour in ATTRIBUTES[attribute] if colour != present]
    return description.recoloured(attribute, others[_drawn(len(others), generator)])


def _drawn(count: int, generator: Generator) -> int:
    return int(torch.randint(count, (), generator=generator))


def _pixels(frames: NDArray[np.uint8], chosen: Tensor, generator: Generator) -> Tensor:
    """One frame of each chosen clip, normalised, [B, 3, S, S]; light and sharpness vary a little."""
    import numpy as np

    times = torch.randint(frames.shape[1], chosen.shape, generator=generator)
    images = np.stack([frames[i, t] for i, t in zip(chosen.tolist(), times.tolist(), strict=True)])
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().float() / 255
    if _drawn(3, generator) == 0:
        blurred = functional.interpolate(pixels, size=(48, 48), mode="bilinear", antialias=True)
        pixels = functional.interpolate(blurred, size=pixels.shape[-2:], mode="bilinear")
    pixels = pixels * (1 + 0.05 * torch.randn(len(pixels), 1, 1, 1, generator=generator))
    pixels = pixels + 0.02 * torch.randn(pixels.shape, generator=generator)
    small = functional.interpolate(pixels.clamp(0, 1), size=(_SIDE, _SIDE), mode="bicubic", antialias=True)
    return (small - _column(_MEAN)) / _column(_STD)


def _column(values: Sequence[float]) -> Tensor:
    return torch.tensor(values)[None, :, None, None]


def _write(folder: Path, clip: Any) -> Path:
    from safetensors.torch import save_file

    vocabulary = clip.config.text_config.vocab_size
    with atomic_directory(folder, replace=True) as new:
        tensors = {key: value.half().contiguous() for key, value in sorted(clip.state_dict().items())}
        with atomic_file(new / "model.safetensors") as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})
        write_json(new / "config.json", clip_config(vocabulary))
        write_clip_tokenizer(new)
        size = {"height": _SIDE, "width": _SIDE}
        document = {
            "crop_size": size,
            "do_center_crop": True,
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": list(_MEAN),
            "image_processor_type": "CLIPImageProcessor",
            "image_std": list(_STD),
            "resample": 3,  # bicubic
            "rescale_factor": 1 / 255,
            "size": {"shortest_edge": _SIDE},
        }
        write_json(new / "preprocessor_config.json", document)
    return folder
