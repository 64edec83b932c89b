"""The tiny portrait model's training: its parts on a few photos, and all of it from the command line."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Event

import numpy as np
import pytest
import torch
from torch.nn import functional

from proteus_deploy.cli.main import main
from proteus_deploy.errors import Cancelled
from proteus_deploy.portrait.captions import CaptionEncoder
from proteus_deploy.portrait.checkpoint import PortraitCheckpoint
from proteus_deploy.portrait.gpt import Gpt
from proteus_deploy.portrait.painter import TorchPainter
from proteus_deploy.portrait.vq import VqModel
from proteus_deploy.reporting import Report
from proteus_deploy.testing import Tolerance, assert_close
from proteus_deploy.tiny.trained import MODEL
from proteus_deploy.training.avatars import make_photo, training_seed
from proteus_deploy.training.randomness import step_generator
from proteus_deploy.training.tiny_model.attribute_heads import label_table
from proteus_deploy.training.tiny_model.descriptions import describe_photo, written_labels
from proteus_deploy.training.tiny_portrait import decoder as decoder_module
from proteus_deploy.training.tiny_portrait import preset
from proteus_deploy.training.tiny_portrait import tokenizer as tokenizer_module
from proteus_deploy.training.tiny_portrait.attribute_judge import JUDGE_SETTINGS, train_judge
from proteus_deploy.training.tiny_portrait.configs import GPT, VQ
from proteus_deploy.training.tiny_portrait.decoder import DECODER_SETTINGS, encode_photos, token_loss
from proteus_deploy.training.tiny_portrait.drawn_photos import PHOTO_SEED, draw_photos
from proteus_deploy.training.tiny_portrait.tokenizer import (
    CODE_SETTINGS,
    SMOOTH_SETTINGS,
    code_loss,
    pixels_of,
    spherical_means,
    train_tokenizer,
)

FLOAT32 = Tolerance(1e-5, "relative", "float32 sums in another order")
FEW = 6


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[np.ndarray, np.ndarray]:
    return draw_photos(tmp_path_factory.mktemp("photos"), FEW, processes=1)


def test_photos_are_drawn_once(drawn: tuple[np.ndarray, np.ndarray], tmp_path: Path) -> None:
    photos, faces = drawn
    photo = make_photo(training_seed(4), PHOTO_SEED, 128)
    assert np.array_equal(photos[4], photo.image)
    assert np.array_equal(faces[4], photo.face_mask)
    seen: list[int] = []
    draw_photos(tmp_path, 2, processes=1, report=lambda _what, done, _total: seen.append(done))
    assert seen == [2]
    draw_photos(tmp_path, 2, processes=1, report=lambda _what, done, _total: seen.append(done))
    assert seen == [2]


def test_drawing_that_was_killed_between_two_files_begins_again(tmp_path: Path) -> None:
    photos, _ = draw_photos(tmp_path, 2, processes=1)
    first = np.array(photos)
    (tmp_path / "photos-2.npy").unlink()  # the one that gets its name last
    again, faces = draw_photos(tmp_path, 2, processes=1)
    assert np.array_equal(again, first)
    assert len(faces) == 2


def test_encoding_stops(drawn: tuple[np.ndarray, np.ndarray], tmp_path: Path) -> None:
    stop = Event()
    stop.set()
    captions = CaptionEncoder(MODEL / "text_encoder", MODEL / "tokenizer", length=32, width=128)
    with pytest.raises(Cancelled, match="stopped at photo 6 of 6"):
        encode_photos(tmp_path, drawn[0], VqModel(VQ), captions, cancel=stop)
    assert not list(tmp_path.iterdir())


def test_means_gather_around_what_there_is() -> None:
    centres = functional.normalize(torch.randn(5, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    around = centres.repeat_interleave(40, dim=0)
    noise = torch.randn(around.shape, generator=torch.Generator().manual_seed(1))
    points = functional.normalize(around + 0.02 * noise, dim=1)
    means = spherical_means(points, 5, 10)
    assert (means @ centres.T).max(dim=0).values.min() > 0.99
    assert_close("lengths", means.norm(dim=1), torch.ones(5), FLOAT32)
    # All points the same: the means that nothing is near to start again, and nothing is undefined.
    assert torch.isfinite(spherical_means(centres[:1].repeat(9, 1), 4, 3)).all()


def test_the_tokenizers_loss(drawn: tuple[np.ndarray, np.ndarray]) -> None:
    torch.manual_seed(0)
    model = VqModel(VQ)
    pixels = pixels_of(drawn[0][:2])
    assert pixels.shape == (2, 3, 128, 128)
    assert pixels.is_contiguous()
    assert pixels.min() >= -1
    assert pixels.max() <= 1
    weights = torch.ones(2, 1, 128, 128)
    parts = code_loss(model, pixels, weights, None)
    parts["loss"].backward()
    assert parts["code"] == parts["commitment"]  # the same numbers, with other gradients
    assert model.quantize.embedding.weight.grad is not None
    assert model.encoder.conv_in.weight.grad is not None
    shaken = code_loss(model, pixels, weights, step_generator(0, 0))
    assert "code" not in shaken
    again = code_loss(model, pixels, weights, step_generator(0, 0))
    assert shaken["loss"] == again["loss"]
    # What is weighted more counts more: all the weight on one row gives that row's error.
    one_row = torch.zeros_like(weights)
    one_row[:, :, 7] = 1
    assert code_loss(model, pixels, one_row, None)["absolute"] != parts["absolute"]


def test_the_decoders_loss_is_the_cross_entropy_of_each_next_token() -> None:
    torch.manual_seed(0)
    gpt = Gpt(GPT)
    tokens = torch.randint(VQ.codebook_size, (2, 256))
    features, valid = torch.randn(2, 32, 128), torch.arange(32) >= torch.tensor([[20], [9]])
    loss = token_loss(gpt, tokens, features, valid)
    with torch.no_grad():
        single = []
        for row in range(2):  # without padding, so without a mask
            own = features[row : row + 1, valid[row]]
            embedded = torch.cat(
                [gpt.embed_condition(own), gpt.tok_embeddings(tokens[row : row + 1, :-1])], 1
            )
            rotary = gpt.rotary[-embedded.shape[1] - 1 : -1]
            logits = gpt(embedded, rotary)[0, own.shape[1] - 1 :]
            single.append(functional.cross_entropy(logits, tokens[row]))
    assert_close(
        "loss", loss, torch.stack(single).mean(), Tolerance(1e-2, "relative", "bfloat16 beside float32")
    )


def test_interrupted_training_goes_on(drawn: tuple[np.ndarray, np.ndarray], tmp_path: Path) -> None:
    """Stopped in either part, the same call ends with the bits of one that wasn't."""
    train = partial(
        train_tokenizer,
        photos=drawn[0],
        faces=drawn[1],
        smooth=replace(SMOOTH_SETTINGS, steps=2, warmup=1),
        codes=replace(CODE_SETTINGS, steps=3, warmup=1),
    )
    whole = train(tmp_path / "whole")
    stop = Event()
    for moment in (("vq_smooth", 1), ("vq", 2)):
        stop.clear()
        with pytest.raises(Cancelled):
            train(tmp_path / "parts", report=_until(moment, stop), cancel=stop)
    parts = train(tmp_path / "parts")
    for name, value in whole.state_dict().items():
        assert torch.equal(parts.state_dict()[name], value), name


def _until(moment: tuple[str, int], stop: Event) -> Report:
    def report(what: str, done: int, _total: int) -> None:
        if (what, done) == moment:
            stop.set()

    return report


def test_the_judge_learns_and_says_nothing_where_nothing_is_written(
    drawn: tuple[np.ndarray, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from proteus_deploy.training.tiny_portrait import attribute_judge

    monkeypatch.setattr(attribute_judge, "_BATCH", FEW)
    judge = train_judge(tmp_path, drawn[0], settings=replace(JUDGE_SETTINGS, steps=40, warmup=5, ema=0.5))
    labels = label_table(
        written_labels(describe_photo(training_seed(index), PHOTO_SEED)) for index in range(FEW)
    )
    right = judge.right(drawn[0], labels)
    assert np.nanmean(list(right.values())) > 0.8  # of the photos that it was shown
    for name, column in zip(judge.heads.names, judge.heads.columns, strict=True):
        assert np.array_equal(np.isnan(right[name]), labels[:, column].numpy() < 0)


def test_all_of_it_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train = preset.train_tiny_portrait

    def short(folder: Path, **arguments: object) -> Path:
        settings = {
            "smooth": replace(SMOOTH_SETTINGS, steps=1, warmup=1),
            "codes": replace(CODE_SETTINGS, steps=1, warmup=1),
            "decoder": replace(DECODER_SETTINGS, steps=1, warmup=1),
        }
        return train(folder, photos=FEW, people=FEW, **settings, **arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(preset, "train_tiny_portrait", short)
    monkeypatch.setattr(decoder_module, "_BATCH", 2)
    monkeypatch.setattr(tokenizer_module, "_BATCH", 2)
    command = ["train", "--preset", "tiny-portrait", "--output-dir", str(tmp_path / "run"), "--json"]
    for _ in range(2):  # the second time nothing is left to do
        assert main(command) == 0
        folder = Path(json.loads(capsys.readouterr().out)["checkpoint"])
        assert folder == tmp_path / "run" / "checkpoint"
    checkpoint = PortraitCheckpoint.open(folder)
    assert (checkpoint.gpt, checkpoint.vq) == (GPT, VQ)
    assert TorchPainter(checkpoint).draw(["a man"])[0].shape == (128, 128, 3)
