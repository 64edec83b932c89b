"""What a step sees: epochs, draws that know no history, dropout, masks."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from proteus_deploy.errors import InputError
from proteus_deploy.training.batches import Batches, TrainBatch
from proteus_deploy.training.randomness import step_generator
from proteus_deploy.training.settings import TrainSettings

CPU = torch.device("cpu")


def batches_of(fake: ModuleType, count: int = 7, *, keypoints: bool = False, **changes: Any) -> Batches:
    settings = TrainSettings(**{**fake.SETTINGS, **changes})
    batches: Batches = fake.make_batches(settings, fake.RandomClips(count, keypoints=keypoints))
    return batches


def tensors(batch: TrainBatch) -> dict[str, Tensor | None]:
    return {
        "noisy": batch.noised.noisy,
        "velocity": batch.noised.velocity,
        "timesteps": batch.noised.timesteps,
        **{name: getattr(batch, name) for name in TrainBatch.__dataclass_fields__ if name != "noised"},
    }


def test_an_epoch_is_a_permutation(fake: ModuleType) -> None:
    """Batches of four out of seven clips: an epoch ends within a batch."""
    batches = batches_of(fake, batch_size=4)
    clips = [batches.dataset[index] for index in range(7)]
    known = {float(clip["heat"].sum()): index for index, clip in enumerate(clips)}
    seen = [known[float(heat.sum())] for step in range(7) for heat in batches(step, range(4), CPU).heat]
    epochs = [seen[at : at + 7] for at in range(0, 28, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_a_place_is_the_same_in_any_split(fake: ModuleType) -> None:
    """Also when steps are asked for out of order, by an object that was made later."""
    whole = tensors(batches_of(fake)(5, range(4), CPU))
    late = batches_of(fake)
    late(1, [3], CPU)
    parts = [tensors(late(5, places, CPU)) for places in ([2, 3], [0], [1])]
    for name, value in whole.items():
        pieces = [part[name] for part in (parts[1], parts[2], parts[0])]
        if value is None:
            assert pieces == [None] * 3
        else:
            assert torch.equal(torch.cat([piece for piece in pieces if piece is not None]), value), name


def test_steps_places_and_seeds_differ(fake: ModuleType) -> None:
    """One clip only, so that nothing but the draw can differ."""
    draws = [
        batches_of(fake, 1, seed=seed)(step, [place], CPU).noised.noisy
        for seed, step, place in ((42, 0, 0), (43, 0, 0), (42, 1, 0), (42, 0, 1))
    ]
    assert all(not torch.equal(draws[0], other) for other in draws[1:])


def test_both_photos_and_all_variants_are_drawn(fake: ModuleType) -> None:
    batches = batches_of(fake, 1, image_dropout=0.0)
    clip = batches.dataset[0]
    chosen = set()
    for step in range(16):
        batch = batches(step, range(4), CPU)
        for image, vector in zip(batch.condition, batch.id_cond, strict=True):
            found = [
                (photo, variant)
                for photo in range(2)
                for variant in range(3)
                if torch.equal(image[0], clip["condition"][photo, variant])
            ]
            ((photo, _),) = found
            assert torch.equal(vector, clip["id_cond"][photo]), "vector and image are of two photos"
            chosen.update(found)
    assert len(chosen) == 6


@pytest.mark.parametrize("keypoints", [False, True])
def test_condition_frames(fake: ModuleType, keypoints: bool) -> None:
    """The photo in frame 0, key points in frame 1, zeros behind; image dropout empties all of it."""
    batches = batches_of(fake, keypoints=keypoints, image_dropout=0.5)
    kept = []
    for step in range(4):
        condition = batches(step, range(4), CPU).condition
        assert condition.shape == (4, 3, 16, 4, 4)
        filled = condition.abs().sum(dim=(2, 3, 4)) > 0
        assert not filled[:, 2].any()
        assert torch.equal(filled[:, 1], filled[:, 0] & keypoints)
        kept += filled[:, 0].tolist()
    assert {True, False} == set(kept)
    batch = batches_of(fake, keypoints=keypoints, image_dropout=0.0)(0, range(4), CPU)
    assert bool((batch.condition[:, 0].abs().sum(dim=(1, 2, 3)) > 0).all())


def test_text_dropout_puts_the_empty_prompt(fake: ModuleType) -> None:
    batches = batches_of(fake, text_dropout=0.5)
    assert batches.empty_prompt is not None
    empty, empty_mask = batches.empty_prompt
    kept = batches_of(fake, text_dropout=0.0)
    dropped = []
    for step in range(4):
        batch, full = batches(step, range(4), CPU), kept(step, range(4), CPU)
        for place in range(4):
            gone = torch.equal(batch.prompt[place], empty)
            assert torch.equal(batch.prompt_mask[place], empty_mask if gone else full.prompt_mask[place])
            assert gone or torch.equal(batch.prompt[place], full.prompt[place])
            dropped.append(gone)
        assert torch.equal(batch.identity, full.identity), "the identity prompt is never dropped"
    assert {True, False} == set(dropped)
    with pytest.raises(InputError, match=r"text_dropout is 0\.5, and there is no empty prompt"):
        Batches(batches.dataset, batches.settings, batches.alphas_cumprod, None)


def test_dropout_shares(fake: ModuleType) -> None:
    """Of 800 draws with probability 0.3, binomial: within four standard deviations, 0.065, of 0.3."""
    batches = batches_of(fake, image_dropout=0.3, text_dropout=0.3, batch_size=100)
    clip = batches.dataset[0]
    drawn = [
        batches._draw(clip, step_generator(42, 3, step, place)) for step in range(8) for place in range(100)
    ]
    image, text = (torch.stack([draw[index] for draw in drawn]).float() for index in (3, 4))
    for kept in (image, text):
        assert abs(float(kept.mean()) - 0.7) < 0.065
    both = float((image * text).mean())
    assert abs(both - 0.49) < 0.07, "one draw decides about both"


def test_one_coin_for_a_step(fake: ModuleType) -> None:
    """Each place alone tosses what the whole batch tosses; about half of the steps are masked."""
    batches = batches_of(fake, mask="face")
    tossed = []
    for step in range(40):
        alone = {batches(step, [place], CPU).mask is not None for place in range(4)}
        assert len(alone) == 1
        tossed.append(alone.pop())
    assert 10 <= sum(tossed) <= 30  # binomial of 40 halves: three standard deviations are 9.5
    step = tossed.index(True)
    masks = batches(step, range(4), CPU).mask
    faces = [batches.dataset[index]["face_mask"] for index in range(7)]
    assert masks is not None
    assert all(any(torch.equal(mask, face) for face in faces) for mask in masks)
    assert all(batches_of(fake, mask_probability=0.0)(s, [0], CPU).mask is None for s in range(9))


def test_timesteps_are_uniform(fake: ModuleType) -> None:
    """Chi-square of 2000 draws in ten bins; nine degrees of freedom pass 27.9 once in a thousand seeds."""
    batches = batches_of(fake)
    clip = batches.dataset[0]
    drawn = torch.stack([batches._draw(clip, step_generator(42, 3, step, 0))[2] for step in range(2000)])
    counts = torch.histc(drawn.float(), bins=10, min=0, max=1000)
    assert float(((counts - 200) ** 2 / 200).sum()) < 27.9
    assert drawn.min() < 10
    assert drawn.max() > 989


def test_latents_are_drawn_anew(fake: ModuleType) -> None:
    """x0 = mean + std n: another sample of the posterior at each step."""
    batches = batches_of(fake, 1)
    first, second = (batches(step, [0], CPU).noised.x0 for step in range(2))
    clip = batches.dataset[0]
    assert not torch.equal(first, second)
    scaled = (first[0] - clip["latent_mean"]) / clip["latent_std"]
    assert abs(float(scaled.mean())) < 0.15  # 768 numbers: four standard errors
    assert abs(float(scaled.std()) - 1) < 0.11


def test_no_clips(fake: ModuleType) -> None:
    with pytest.raises(InputError, match="there is no clip to train on"):
        batches_of(fake, 0)
