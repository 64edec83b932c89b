from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from proteus_deploy.cli import convert as command
from proteus_deploy.errors import CheckpointError, InputError
from proteus_deploy.identity.face_parser import load_face_parser
from proteus_deploy.pickle_conversion import convert, convert_folder


class Touch:
    """What a hostile pickle looks like: opening it runs a command."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.file}",)


def state() -> dict[str, torch.Tensor]:
    shared = torch.arange(6.0)
    return {
        "a.weight": shared.reshape(2, 3).t(),
        "a.tied": shared,
        "b.weight": torch.ones(2, dtype=torch.bfloat16),
        "b.steps": torch.tensor(7),
    }


@pytest.mark.parametrize("wrap", [None, "state_dict", "model", "module"])
@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_survive(tmp_path: Path, wrap: str | None, zipped: bool) -> None:
    file = tmp_path / "net.pth"
    document: object = state() if wrap is None else {wrap: state(), "epoch": 3}
    torch.save(document, file, _use_new_zipfile_serialization=zipped)
    written = convert(file)
    assert written == tmp_path / "net.safetensors"
    found, expected = load_file(written), state()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.pth", "net.safetensors"]


def test_wrappers_in_wrappers_and_data_parallel_names(tmp_path: Path) -> None:
    file = tmp_path / "net.bin"
    torch.save({"model": {"state_dict": {"module.w": torch.ones(2), "module.v": torch.zeros(1)}}}, file)
    assert load_file(convert(file, tmp_path / "out.safetensors")).keys() == {"w", "v"}


def test_code_in_a_pickle_is_never_run(tmp_path: Path) -> None:
    file, mark = tmp_path / "evil.pt", tmp_path / "ran"
    torch.save({"w": torch.ones(1), "x": Touch(mark)}, file)
    with pytest.raises(CheckpointError, match="holds code or objects besides tensors and will not be loaded"):
        convert(file)
    assert not mark.exists()
    assert not file.with_suffix(".safetensors").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"no pickle", r"will not be loaded|can't be read"),
        (b"PK\x03\x04x", "can't be read"),
    ],
)
def test_files_that_are_no_checkpoint(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "net.pt"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        convert(file)


@pytest.mark.parametrize("document", [[torch.ones(1)], {}, {"epoch": 1}, torch.ones(2)])
def test_nothing_to_convert(tmp_path: Path, document: object) -> None:
    file = tmp_path / "net.pt"
    torch.save(document, file)
    with pytest.raises(CheckpointError, match="no named tensors"):
        convert(file)


def test_names_that_do_not_fit(tmp_path: Path) -> None:
    file = tmp_path / "net.pt"
    torch.save(state(), file)
    with pytest.raises(InputError, match=r"does not end in \.safetensors"):
        convert(file, tmp_path / "net.onnx")
    with pytest.raises(InputError, match="not a file ending in"):
        convert(tmp_path / "net.safetensors")


def test_a_folder_converts_every_pickle_below(tmp_path: Path) -> None:
    for name in ("a.pt", "deep/er/b.pth", "deep/c.bin"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        torch.save(state(), tmp_path / name)
    written = convert_folder(tmp_path)
    assert [file.name for file in written] == ["a.safetensors", "c.safetensors", "b.safetensors"]
    torch.save(state(), tmp_path / "a.bin")
    with pytest.raises(InputError, match="would both become"):
        convert_folder(tmp_path)
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="nothing to convert"):
        convert_folder(tmp_path / "none")


def test_a_converted_parser_loads(golden: Path, tmp_path: Path) -> None:
    file = tmp_path / "parsing_bisenet.pth"
    torch.save(load_file(golden / "face_parser_weights.safetensors"), file)
    load_face_parser(convert(file))


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args(words))


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, other = tmp_path / "net.pt", tmp_path / "other.safetensors"
    torch.save(state(), file)
    assert run(str(file)) == 0
    assert f"wrote {tmp_path / 'net.safetensors'}" in capsys.readouterr().out
    assert run(str(file), "--output", str(other)) == 0
    assert other.is_file()
    assert run(str(tmp_path)) == 0
    with pytest.raises(InputError, match="names one file"):
        run(str(tmp_path), "--output", str(other))
    with pytest.raises(InputError, match="does not exist"):
        run(str(tmp_path / "absent.pt"))
