"""CLIPScore, how well frames show what the prompt says, and the temporal consistency of image features.

CLIPScore is 100 times the cosine between text and frame, averaged over 16 frames (CLIP ViT-B/32; its
`logits_per_image` is the same number, since its temperature was trained to 100). The published code hands
its frames over as OpenCV decodes them, blue first, while the network was trained on red first. Both orders
are measured: RGB is the score, BGR is for comparison with published tables.

Axes: F frames, H, W pixels, S side of the network's input (224), D features.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from proteus_deploy.errors import CheckpointError, InputError
from proteus_deploy.evaluate.frames import check_frames, clip_samples
from proteus_deploy.identity._weights import fill_module, read_tensors
from proteus_deploy.identity.encoder import weights_file
from proteus_deploy.weights import read_json

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

__all__ = ["ClipEncoder", "clip_score", "score_features", "temporal_consistency"]

_BATCH = 16
_MEAN = [0.48145466, 0.4578275, 0.40821073]
_STD = [0.26862954, 0.26130258, 0.27577711]
_POSITIONS = "position_ids"
_PREPROCESSOR = "preprocessor_config.json"


class ClipEncoder:
    """A CLIP folder in transformers' layout: config.json, model.safetensors and the tokenizer's files.

    Statistics of the input come from preprocessor_config.json where the folder has it, else they are CLIP's.
    Raises CheckpointError when a file is missing, damaged, or of another network; nothing is downloaded.
    """

    def __init__(self, folder: str | Path, *, device: str = "cpu") -> None:
        import torch
        from transformers import CLIPConfig, CLIPModel

        folder = Path(folder)
        document = read_json(folder / "config.json")
        if document.get("model_type") != "clip":
            raise CheckpointError(
                f"{folder / 'config.json'} is for a {document.get('model_type')!r} model; expected 'clip'"
            )
        file = self.file = _weights(folder)
        config: Any = CLIPConfig.from_dict(document)
        with torch.device("meta"):
            model: Any = CLIPModel(config)
        # Older files store these counters; they are no weights.
        fill_module(
            model, {key: v for key, v in read_tensors(file).items() if not key.endswith(_POSITIONS)}, file
        )
        for part in (model.text_model, model.vision_model):
            embeddings = part.embeddings
            count = embeddings.position_embedding.num_embeddings
            embeddings.register_buffer(_POSITIONS, torch.arange(count)[None], persistent=False)
        self._tokenizer = _tokenizer(folder, config.text_config.vocab_size)
        self._model = model.to(device)
        self._device = device
        self.side: int = config.vision_config.image_size
        self.max_tokens: int = config.text_config.max_position_embeddings
        self._mean, self._std = _statistics(folder / _PREPROCESSOR)

    def image_features(self, frames: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 [F, H, W, 3] -> float32 [F, D] of norm 1."""
        import torch

        check_frames(frames)
        features = []
        with torch.inference_mode():
            for start in range(0, len(frames), _BATCH):
                pixels = self.prepare(frames[start : start + _BATCH]).to(self._device)
                pooled = self._model.vision_model(pixel_values=pixels).pooler_output
                features.append(self._model.visual_projection(pooled).float().cpu())
        return _normalised(torch.cat(features))

    def differentiable_features(self, frames: Tensor) -> Tensor:
        """float [F, 3, H, W] in [0, 1] -> float32 [F, D] of norm 1, with gradients to the frames.

        Resized by PyTorch's bicubic filter, which is Pillow's but for the rounding to whole levels.
        """
        import torch
        from torch.nn import functional

        frames = frames.to(self._device)
        (width, height), box = self._resizing(frames.shape[2], frames.shape[3])
        pixels = functional.interpolate(
            frames.float(), size=(height, width), mode="bicubic", align_corners=False, antialias=True
        )
        pixels = pixels[..., box[1] : box[3], box[0] : box[2]].clamp(0, 1)
        mean, deviation = (
            torch.from_numpy(one).to(frames.device)[:, None, None] for one in (self._mean, self._std)
        )
        pooled = self._model.vision_model(pixel_values=(pixels - mean) / deviation).pooler_output
        return functional.normalize(self._model.visual_projection(pooled).float(), dim=-1)

    def text_features(self, prompt: str) -> NDArray[np.float32]:
        """A prompt -> float32 [1, D] of norm 1; what is beyond `max_tokens` (77) is cut off."""
        import torch

        tokens = self._tokenizer([prompt], truncation=True, max_length=self.max_tokens, return_tensors="pt")
        with torch.inference_mode():
            pooled = self._model.text_model(
                input_ids=tokens["input_ids"].to(self._device),
                attention_mask=tokens["attention_mask"].to(self._device),
            ).pooler_output
            return _normalised(self._model.text_projection(pooled).float().cpu())

    def prepare(self, frames: NDArray[np.uint8]) -> Tensor:
        """uint8 [F, H, W, 3] -> float32 [F, 3, S, S]: short side to S (bicubic), middle, normalised."""
        import torch
        from PIL import Image

        size, box = self._resizing(*frames.shape[1:3])
        images = [
            Image.fromarray(np.ascontiguousarray(frame)).resize(size, Image.Resampling.BICUBIC).crop(box)
            for frame in frames
        ]
        pixels = np.stack([np.asarray(image, dtype=np.float32) for image in images]) / np.float32(255)
        return torch.from_numpy((pixels - self._mean) / self._std).permute(0, 3, 1, 2).contiguous()

    def _resizing(self, height: int, width: int) -> tuple[tuple[int, int], tuple[int, int, int, int]]:
        """(width, height) after resizing, and the middle square of it: left, top, right, bottom."""
        short = min(height, width)
        # The longer side is rounded down, as CLIP's own preparation does.
        size = (int(self.side * width / short), int(self.side * height / short))
        left, top = (size[0] - self.side) // 2, (size[1] - self.side) // 2
        return size, (left, top, left + self.side, top + self.side)


def clip_score(
    frames: NDArray[np.uint8], prompt: str, encoder: ClipEncoder, *, as_published: bool = False
) -> float:
    """100 times the mean cosine between the prompt and frames floor(i F / 16).

    frames: RGB uint8 [F, H, W, 3]. as_published: show the network BGR, the defect of the published code.
    """
    check_frames(frames)
    chosen = frames[clip_samples(len(frames))]
    return score_features(
        encoder.image_features(chosen[..., ::-1] if as_published else chosen), prompt, encoder
    )


def score_features(features: NDArray[np.float32], prompt: str, encoder: ClipEncoder) -> float:
    """The same from image features [S, D] of norm 1 that are already there."""
    return float(100 * (features.astype(np.float64) @ encoder.text_features(prompt)[0]).mean())


def temporal_consistency(features: NDArray[np.float32]) -> float:
    """Mean cosine of the CLIP image features of neighbouring frames, [F, D] of norm 1, F > 1.

    The T-cons of PersonalVideo's tables. A still picture has 1, so it says nothing without the motion.
    """
    if len(features) < 2:
        raise InputError("temporal consistency compares neighbouring frames; the video has one frame")
    return float((features[:-1].astype(np.float64) * features[1:]).sum(axis=1).mean())


def _weights(folder: Path) -> Path:
    """model.safetensors; the pickle of the same network has another stem, so it is looked for by that."""
    pickle = folder / "pytorch_model.bin"
    if not (folder / "model.safetensors").is_file() and pickle.is_file():
        raise CheckpointError(
            f"{pickle} is a pickle, and pickles are not loaded: they can run code. Convert it once with: "
            f"proteus-deploy convert {pickle} --output {folder / 'model.safetensors'}"
        )
    return weights_file(folder, "model.safetensors")


def _tokenizer(folder: Path, vocabulary: int) -> Any:
    from transformers import AutoTokenizer

    # Where files are missing, the library makes a tokenizer without words, silently.
    if not any(
        all((folder / name).is_file() for name in names)
        for names in (("tokenizer.json",), ("vocab.json", "merges.txt"))
    ):
        raise CheckpointError(f"{folder} has no tokenizer; copy tokenizer.json, or vocab.json and merges.txt")
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        largest = max(tokenizer.get_vocab().values())
    except Exception as error:  # the tokenizer library raises many types for a broken file
        raise CheckpointError(
            f"{folder} has a tokenizer that can't be read ({type(error).__name__}: {error}); copy it again"
        ) from error
    if largest >= vocabulary:
        raise CheckpointError(
            f"{folder} has a tokenizer of tokens up to {largest}, and the network has {vocabulary}; "
            "copy both from one model"
        )
    return tokenizer


def _statistics(file: Path) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    document = read_json(file) if file.is_file() else {}
    values = [
        np.asarray(document.get(name, usual)) for name, usual in (("image_mean", _MEAN), ("image_std", _STD))
    ]
    if any(value.shape != (3,) or value.dtype.kind not in "fi" for value in values):
        raise CheckpointError(f"{file}: image_mean and image_std must be three numbers each")
    return values[0].astype(np.float32), values[1].astype(np.float32)


def _normalised(features: Tensor) -> NDArray[np.float32]:
    return np.asarray((features / features.norm(dim=-1, keepdim=True)).numpy(), dtype=np.float32)
