"""The tiny model's image tower, trained on grey aligned faces as `IdentityEncoder` makes them.

It learns three things at once: to agree with the identity prompt, as a CLIP tower does; to know the same
person in another photo; and, through heads that are dropped, to show single traits in its states.
Axes: B faces, two of each person, N tokens, W width.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from threading import Event

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from proteus_deploy._files import atomic_file, write_json
from proteus_deploy.identity.encoder import FACE_FOLDER, TOWER_NAME, normalise_tower_input
from proteus_deploy.identity.image_tower import CONFIG_NAME, ImageTower, ImageTowerSizes, rope_tables
from proteus_deploy.reporting import Report, no_report
from proteus_deploy.training.avatars import training_seed
from proteus_deploy.training.tiny_model.aligned_faces import (
    HEAD,
    LUMINANCE,
    DrawnPhotos,
    align_batch,
    draw_photos,
)
from proteus_deploy.training.tiny_model.attribute_heads import (
    AttributeHeads,
    label_table,
    same_first_weights,
)
from proteus_deploy.training.tiny_model.descriptions import attribute_labels, describe_photo
from proteus_deploy.training.tiny_model.fitting import FitSettings, fit
from proteus_deploy.training.tiny_model.text_encoder import TEXT_WIDTH, FrozenText

__all__ = ["TOWER_SIZES", "train_image_tower"]

TOWER_SIZES = ImageTowerSizes(
    width=96,
    depth=6,
    head_width=32,
    mlp_width=256,
    patch=14,
    grid=6,
    pooled=64,
    hidden_layers=(2, 3, 4, 5, 6),
)

_PEOPLE, _PHOTO_SIZE = 1500, 224
_PEOPLE_OF_BATCH = 32
# Faces are masked at twice the tower's resolution, so that the mask's edge is as soft as the pipeline's.
_SIDE = TOWER_SIZES.image_size
_CROP = 2 * _SIDE
# What a grey face without background shows.
_TRAITS = ("kind", "age", "hair style", "hair colour", "hat", "glasses", "facial hair", "face shape")


def train_image_tower(
    folder: Path, *, steps: int = 900, report: Report = no_report, cancel: Event | None = None
) -> Path:
    """Write the tower and image_tower.json into `folder/face_encoder/`; returns the tower's path.

    Needs the text encoder of `train_text_encoder` in `folder` (InputError). Photos lie in `folder/photos/`,
    states of the training in `folder/fits/`. Raises as `fit` does.
    """
    text = FrozenText(folder)
    photos = draw_photos(folder / "photos", _PEOPLE, 2, _PHOTO_SIZE, report=report)
    descriptions = [describe_photo(training_seed(index), 0) for index in range(_PEOPLE)]
    prompts = [description.identity_prompt for description in descriptions]
    labels = label_table(attribute_labels(description) for description in descriptions)
    states = text.states(prompts)
    number_of = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    numbers = torch.tensor([number_of[prompt] for prompt in prompts])
    with same_first_weights(5):
        network = _Trained()

    def loss(_: int, generator: Generator) -> tuple[Tensor, Mapping[str, float]]:
        people = torch.randperm(_PEOPLE, generator=generator)[:_PEOPLE_OF_BATCH]
        faces = _batch(photos, torch.cat([2 * people, 2 * people + 1]), generator)
        return network.loss(faces, states[people], numbers[people], labels[people])

    settings = FitSettings(steps=steps, learning_rate=1.5e-3, weight_decay=0.02, seed=5)
    fit(network, loss, settings, folder=folder / "fits", name="image_tower", report=report, cancel=cancel)
    return _write(folder / FACE_FOLDER, network.tower)


class _Trained(nn.Module):
    """The tower and the heads that teach it."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = ImageTower(TOWER_SIZES)
        for name, parameter in self.tower.named_parameters():
            if name in ("cls_token", "pos_embed"):
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith(("q_bias", "v_bias")):
                nn.init.zeros_(parameter)
        self.of_text = nn.Linear(TEXT_WIDTH, TOWER_SIZES.pooled)
        self.of_class = AttributeHeads(TOWER_SIZES.width, _TRAITS)
        self.of_patches = AttributeHeads(TOWER_SIZES.width, _TRAITS)
        self.of_early_patches = AttributeHeads(TOWER_SIZES.width, _TRAITS)
        # Logarithms of the factors on cosines, one for words and one for people.
        self.sharpness = nn.Parameter(torch.tensor([2.3, 2.3]))

    def loss(
        self, faces: Tensor, states: Tensor, numbers: Tensor, labels: Tensor
    ) -> tuple[Tensor, Mapping[str, float]]:
        """faces: [2 B, 3, S, S], first and second photos; states [B, L, W] of the identity prompts, whose
        numbers [B] are equal where the prompts are; labels [B, A].
        """
        outputs = self.tower(face=faces)
        pooled = functional.normalize(outputs["pooled"], dim=1)
        first, second = pooled.chunk(2)
        words = functional.normalize(self.of_text(states.mean(dim=1)), dim=1)
        to_words, to_people = self.sharpness.clamp(max=4.0).exp()
        same = numbers[:, None] == numbers[None]
        agree = _contrast(to_words * first @ words.T, same) + _contrast(to_words * second @ words.T, same)
        person_logits = to_people * first @ second.T
        known = _contrast(person_logits, torch.eye(len(numbers), dtype=torch.bool))
        last, early = outputs["hidden_4"], outputs["hidden_1"]
        twice = torch.cat([labels, labels])
        traits = self.of_class.loss(last[:, 0], twice) + self.of_patches.loss(last[:, 1:].mean(dim=1), twice)
        traits = traits + 0.3 * self.of_early_patches.loss(early[:, 1:].mean(dim=1), twice)
        everyone = torch.arange(len(numbers))
        right = self.of_class.accuracies(last[:, 0], twice)
        details = {
            "words": float(agree.detach()) / 2,
            "people": float(known.detach()),
            "traits": float(traits.detach()) / 2.3,
            "same_person": float((person_logits.argmax(dim=1) == everyone).float().mean()),
            "right": sum(right.values()) / len(right),
        }
        return 0.5 * agree + known + 4 * traits, details


def _contrast(logits: Tensor, same: Tensor) -> Tensor:
    """Cross entropy both ways of logits [B, B] whose diagonal is right; others in `same` are no error."""
    others = same & ~torch.eye(len(same), dtype=torch.bool)
    logits = logits.masked_fill(others, float("-inf"))
    right = torch.arange(len(logits))
    return (functional.cross_entropy(logits, right) + functional.cross_entropy(logits.T, right)) / 2


def _batch(photos: DrawnPhotos, chosen: Tensor, generator: Generator) -> Tensor:
    """The tower's input [B, 3, S, S]: faces in other light, more or less sharp, all else painted white."""
    pixels, parts = align_batch(photos, chosen, _CROP, generator)
    count = len(pixels)
    # One channel until the end: the three are equal.
    grey = torch.einsum("bchw,c->bhw", pixels, torch.tensor(LUMINANCE))[:, None]
    gains = 1 + 0.08 * torch.randn(count, 1, 1, 1, generator=generator)
    offsets = 0.04 * torch.randn(count, 1, 1, 1, generator=generator)
    grey = (grey * gains + offsets).clamp(0, 1)
    grey = grey.masked_fill(_uncertain(parts[:, None], generator) < HEAD, 1.0)
    if torch.rand((), generator=generator) < 0.4:
        side = int(torch.randint(_SIDE // 2, _CROP, (), generator=generator))
        grey = functional.interpolate(grey, size=(side, side), mode="bilinear", antialias=True)
    grey = functional.interpolate(grey, size=(_SIDE, _SIDE), mode="bicubic", antialias=True)
    noise = torch.randn(grey.shape, generator=generator)
    grey = grey + 0.02 * torch.rand(count, 1, 1, 1, generator=generator) * noise
    return normalise_tower_input(grey.expand(-1, 3, -1, -1), _SIDE)


def _uncertain(parts: Tensor, generator: Generator) -> Tensor:
    """Parts, float32 [B, 1, S, S], whose edges are off by up to two pixels, as a parser's are."""
    reach = int(torch.randint(3, (), generator=generator))
    exact = parts.float()
    if reach == 0:
        return exact
    grown = torch.rand(len(parts), 1, 1, 1, generator=generator) < 0.5
    # Growing the negative shrinks.
    signs = torch.where(grown, 1.0, -1.0)
    return signs * functional.max_pool2d(signs * exact, 2 * reach + 1, 1, padding=reach)


def _write(folder: Path, tower: ImageTower) -> Path:
    """The public names, `visual.…`, with the rotation tables that the public file has; half precision."""
    from safetensors.torch import save_file

    sizes = tower.sizes
    cosines, sines = rope_tables(sizes.grid, sizes.head_width)
    tensors = {f"visual.{key}": value for key, value in tower.state_dict().items()}
    tensors |= {"visual.rope.freqs_cos": cosines, "visual.rope.freqs_sin": sines}
    path = folder / TOWER_NAME
    with atomic_file(path) as temporary:
        save_file(
            {key: tensors[key].half().contiguous() for key in sorted(tensors)},
            temporary,
            metadata={"format": "pt"},
        )
    write_json(folder / CONFIG_NAME, {"hidden_layers": list(sizes.hidden_layers)})
    return path
