from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from proteus_deploy.errors import InputError
from proteus_deploy.model.networks import TextEncoder
from proteus_deploy.tokens import Tokenizer
from proteus_deploy.training.tiny_model import text_encoder
from proteus_deploy.training.tiny_model.descriptions import ATTRIBUTES, UNKNOWN
from proteus_deploy.training.tiny_model.fitting import step_generator
from proteus_deploy.training.tiny_model.text_encoder import (
    FrozenText,
    text_encoder_config,
    train_text_encoder,
)
from proteus_deploy.training.tiny_model.text_tokenizer import TABLE_ROWS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_encoder, "_PEOPLE", 20)
        patch.setattr(text_encoder, "_BATCH", 4)
        folder = tmp_path_factory.mktemp("text")
        train_text_encoder(folder, steps=2)
    return folder


@pytest.fixture(scope="module")
def encoder(folder: Path) -> TextEncoder:
    """Filled as the pipeline fills it: `shared.weight` serves as the encoder's table too."""
    network = TextEncoder(text_encoder_config())
    tensors = {key: v.float() for key, v in load_file(folder / "text_encoder/model.safetensors").items()}
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"]
    network.t5.load_state_dict(tensors)
    return network.eval()


def test_the_file_holds_the_table_once_and_no_heads(folder: Path) -> None:
    tensors = load_file(folder / "text_encoder/model.safetensors")
    assert {key.split(".")[0] for key in tensors} == {"shared", "encoder"}
    assert "encoder.embed_tokens.weight" not in tensors
    assert tensors["shared.weight"].shape == (TABLE_ROWS, 128)
    assert {value.dtype for value in tensors.values()} == {torch.float16}


def test_transformers_reads_the_folder(folder: Path, encoder: TextEncoder) -> None:
    from transformers import T5EncoderModel

    read = T5EncoderModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    ids, _ = Tokenizer(folder / "tokenizer")("a man with a bald head", 20)
    states = read(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    assert torch.equal(states, encoder(ids))


@torch.no_grad()
def test_frozen_text_gives_the_states_of_the_pipeline(folder: Path, encoder: TextEncoder) -> None:
    prompt = "a woman with curly red hair in a yellow hoodie"
    ids, _ = Tokenizer(folder / "tokenizer")(prompt, 20)
    # One text at a time in the pipeline: the length of another prompt must not matter.
    states = FrozenText(folder).states(["", prompt], 20)
    assert states.shape == (2, 20, 128)
    torch.testing.assert_close(states[1:], encoder(ids), rtol=1e-4, atol=1e-5)


def test_frozen_text_needs_a_trained_encoder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="train the text encoder first"):
        FrozenText(tmp_path)


def test_a_second_call_gives_the_same_bytes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = folder / "text_encoder/model.safetensors"
    before = file.read_bytes()
    file.unlink()
    monkeypatch.setattr(text_encoder, "_PEOPLE", 20)
    train_text_encoder(folder, steps=2)
    assert file.read_bytes() == before


def test_batches_have_the_lengths_of_the_pipeline(folder: Path) -> None:
    data = text_encoder._Prompts.of_training_people(folder / "tokenizer", 30)
    shapes = {data.draw(step_generator(0, step))[0].shape[1] for step in range(40)}
    assert shapes == {20, 36, 48}


def test_general_sentences_and_empty_prompts_have_no_labels(folder: Path) -> None:
    data = text_encoder._Prompts.of_training_people(folder / "tokenizer", 30)
    assert (data.labels[60:] == UNKNOWN).all()
    assert (data.ids[-1] == torch.tensor([1] + [0] * 47)).all()
    clothes = list(ATTRIBUTES).index("clothes")
    assert (data.labels[:60, clothes] != UNKNOWN).all()
    # An identity prompt says nothing about clothes.
    assert (data.identity_labels[:, clothes] == UNKNOWN).all()


def test_every_part_of_the_loss_teaches_the_encoder() -> None:
    network = text_encoder._Trained()
    ids = torch.randint(3, 300, (8, 12))
    labels = torch.zeros(8, len(ATTRIBUTES), dtype=torch.int64)
    loss, details = network.loss(ids, labels, step_generator(0, 0))
    loss.backward()
    assert set(details) == {"masked", "kept", "before", "after", "attributes", "right"}
    assert all(value >= 0 for value in details.values())
    unused = [name for name, value in network.named_parameters() if value.grad is None]
    assert not unused
