"""Adapters on disk: what others write is read as they mean it, they read ours, the rest is refused."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from proteus_deploy.adapters import Adapter, AdapterUse, TimestepGate, read_adapter, save_adapter
from proteus_deploy.adapters.adapter import Factors
from proteus_deploy.adapters.files import parse_adapter
from proteus_deploy.cli.adapter_flags import adapters_of
from proteus_deploy.errors import AdapterError, InputError

MODULE = "transformer_blocks.0.attn1.to_q"


def _same(ours: Adapter, theirs: Adapter) -> None:
    assert set(ours.factors) == set(theirs.factors)
    for module, factors in ours.factors.items():
        other = theirs.factors[module]
        assert torch.allclose(factors.up @ factors.down, other.up @ other.down, atol=1e-6), module


def test_what_was_saved_is_read(make_adapter: Callable[..., Adapter], tmp_path: Path) -> None:
    adapter = make_adapter(gate=TimestepGate(0, 250), base="a" * 64, person="b" * 64)
    save_adapter(adapter, tmp_path / "anna.safetensors")
    found = read_adapter(tmp_path / "anna.safetensors")
    assert (found.name, found.gate, found.base, found.person) == ("anna", adapter.gate, "a" * 64, "b" * 64)
    assert found.hash == adapter.hash
    assert make_adapter(1).hash != make_adapter(0).hash


@pytest.fixture
def published() -> Any:
    """A CogVideoX transformer of diffusers, four blocks 96 wide."""
    from diffusers import CogVideoXTransformer3DModel

    torch.manual_seed(0)
    return CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=48,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=16,
        num_layers=4,
        sample_width=4,
        sample_height=4,
        sample_frames=5,
        max_text_seq_length=8,
    )


def test_diffusers_reads_ours(make_adapter: Callable[..., Adapter], published: Any, tmp_path: Path) -> None:
    adapter = make_adapter(2, rank=5)
    save_adapter(adapter, tmp_path / "style.safetensors")
    published.load_lora_adapter(load_file(tmp_path / "style.safetensors"), prefix="transformer")
    for module, factors in adapter.factors.items():
        layer = published.get_submodule(module)
        delta = layer.get_delta_weight(layer.active_adapters[0])
        assert torch.allclose(delta, factors.up @ factors.down, atol=1e-6), module


@pytest.mark.parametrize("how", [{"lora_alpha": 6}, {"lora_alpha": 3, "use_rslora": True}], ids=str)
def test_ours_reads_diffusers(published: Any, tmp_path: Path, how: dict[str, Any]) -> None:
    """With the scale that its metadata give, by which the published layer acts."""
    from peft import LoraConfig

    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    published.add_adapter(LoraConfig(r=4, target_modules=targets, init_lora_weights=False, **how))
    published.save_lora_adapter(tmp_path)
    theirs = read_adapter(tmp_path)
    assert len(theirs.factors) == 16
    for module, factors in theirs.factors.items():
        layer = published.get_submodule(module)
        assert torch.allclose(layer.get_delta_weight("default"), factors.up @ factors.down, atol=1e-6), module


def test_a_folder_of_peft(make_adapter: Callable[..., Adapter], tmp_path: Path) -> None:
    adapter = make_adapter(3)
    tensors = {}
    for module, factors in adapter.factors.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = factors.down
        tensors[f"base_model.model.{module}.lora_B.weight"] = factors.up / 4
    folder = tmp_path / "anna"
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 12}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    found = read_adapter(folder)
    _same(found, adapter)
    assert (found.name, found.gate, found.base) == ("anna", TimestepGate(), None)


def test_older_names_and_alphas(make_adapter: Callable[..., Adapter], tmp_path: Path) -> None:
    adapter = make_adapter(4)
    tensors = {}
    for module, factors in adapter.factors.items():
        tensors[f"transformer.{module}.lora.down.weight"] = factors.down
        tensors[f"transformer.{module}.lora.up.weight"] = factors.up * 3
        tensors[f"transformer.{module}.alpha"] = torch.tensor(1.0)
    save_file(tensors, tmp_path / "old.safetensors")
    _same(read_adapter(tmp_path / "old.safetensors"), adapter)


def _file(tmp_path: Path, tensors: dict[str, torch.Tensor], **header: str) -> Path:
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt", **header})
    return tmp_path / "x.safetensors"


def _pair(down: torch.Tensor, up: torch.Tensor, module: str = MODULE) -> dict[str, torch.Tensor]:
    return {f"transformer.{module}.lora_A.weight": down, f"transformer.{module}.lora_B.weight": up}


def _raw(header: str) -> bytes:
    return len(header).to_bytes(8, "little") + header.encode()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (_raw('{"__metadata__": null}'), "changes nothing"),
        (_raw('{"__metadata__": {"a": 1}}'), "object of texts"),
        (_raw("[]"), r"its header is \[\]"),
        (_raw('{"a": {"dtype": "F32", "shape": [0, 9223372036854775808], "data_offsets": [0, 0]}}'), "shape"),
        (_raw('{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}'), "can't be read as safeten"),
        (_raw('{"a": 5}'), "numbers of type None"),
        (b"\xff" * 8, "its header would have"),
        (b"", "can't be read as safetensors"),
    ],
)
def test_broken_headers(data: bytes, message: str, tmp_path: Path) -> None:
    """No more than their message comes of them, as file and as upload."""
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(AdapterError, match=message):
        parse_adapter(data, name="x")
    with pytest.raises(AdapterError, match=message):
        read_adapter(tmp_path / "x.safetensors")


def test_the_first_end_of_a_name_counts_as_in_peft(published: Any, tmp_path: Path) -> None:
    from peft import LoraConfig

    pattern = {"0.attn1.to_q": 16, "attn1.to_q": 8, "to_v": 4}  # a file has them sorted
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=targets, init_lora_weights=False, alpha_pattern=pattern
    )
    published.add_adapter(config)
    published.save_lora_adapter(tmp_path)
    for module, factors in read_adapter(tmp_path).factors.items():
        layer = published.get_submodule(module)
        assert torch.allclose(layer.get_delta_weight("default"), factors.up @ factors.down, atol=1e-6), module


GOOD = _pair(torch.ones(2, 96), torch.ones(96, 2))


@pytest.mark.parametrize(
    ("tensors", "header", "message"),
    [
        (_pair(torch.full((2, 96), torch.nan), torch.ones(96, 2)), {}, "hold NaN"),
        (_pair(torch.ones(2, 96), torch.ones(96, 3)), {}, r"\[2, 96\] and \[96, 3\]; they must be"),
        (_pair(torch.ones(96), torch.ones(96, 1)), {}, r"\[96\] and \[96, 1\]"),
        (_pair(torch.ones(2, 96).to(torch.float8_e4m3fn), torch.ones(96, 2)), {}, "not 8-bit ones"),
        (_pair(torch.ones(0, 96), torch.ones(96, 0)), {}, r"has the shape \[.*0.*\]"),
        (GOOD | {"diffusion_model." + key[12:]: value.clone() for key, value in GOOD.items()}, {}, "twice"),
        (GOOD | {f"transformer.{MODULE[:-1]}k.alpha": torch.ones(1)}, {}, "and no factors of it"),
        (
            {key.replace("transformer.", "base_model.model.", 1): value for key, value in GOOD.items()},
            {},
            "adapter_config.json, which is not here",
        ),
        (_pair(torch.ones(2, 96), torch.ones(96, 2), MODULE.replace("0", "00")), {}, "adapters change"),
        (GOOD, {"lora_adapter_metadata": '{"lora_alpha": 1' + "0" * 400 + "}"}, "alpha of .* is 1"),
        (GOOD, {"lora_adapter_metadata": '{"alpha_pattern": {".*to_q": 1}}'}, "an expression"),
        (GOOD, {"proteus_adapter": "x" * (1 << 20)}, "its header would have"),
        (_pair(torch.ones(2, 96), torch.ones(64, 2)), {}, r"widths \[64, 96\]"),
        (_pair(torch.ones(2, 9, dtype=torch.int8), torch.ones(9, 2)), {}, "whole numbers"),
        (
            _pair(torch.ones(2, 96), torch.ones(384, 2), "transformer_blocks.0.ff.net.2"),
            {},
            "adapters change transformer_blocks.N.attn1's to_q",
        ),
        ({f"transformer.{MODULE}.lora_A.weight": torch.ones(2, 96)}, {}, "has no lora_B.weight"),
        ({"transformer.proj_out.weight": torch.ones(2, 2)}, {}, "no factor of a LoRA"),
        ({}, {}, "changes nothing"),
        (GOOD, {"proteus_adapter": "{"}, "not readable JSON"),
        (GOOD, {"proteus_adapter": '{"schema_version": 2}'}, "schema_version 2; this release reads 1"),
        (GOOD, {"proteus_adapter": '{"schema_version": 1, "gate": [5, 2]}'}, "0 <= low < high <= 1000"),
        (
            GOOD,
            {"proteus_adapter": '{"schema_version": 1, "gate": [0, 9], "base": "f"}'},
            "base is 'f'; it must be a sha256",
        ),
        (GOOD, {"lora_adapter_metadata": '{"transformer.lora_alpha": NaN}'}, "alpha of .* is nan"),
        (GOOD, {"lora_adapter_metadata": '{"transformer.use_dora": true}'}, "DoRA"),
        (GOOD, {"lora_adapter_metadata": '{"transformer.peft_type": "LOHA"}'}, "only LORA is read"),
    ],
)
def test_broken_files(
    tmp_path: Path, tensors: dict[str, torch.Tensor], header: dict[str, str], message: str
) -> None:
    file = _file(tmp_path, tensors, **header)
    with pytest.raises(AdapterError, match=message) as caught:
        read_adapter(file)
    assert str(file) in str(caught.value)
    with pytest.raises(AdapterError, match=message) as caught:
        parse_adapter(file.read_bytes(), name="upload")
    assert str(caught.value).startswith("upload")
    assert "upload: upload" not in str(caught.value)


def test_no_pickle_is_opened(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (pytest.fail, ("the pickle was opened",))

    for name in ("anna.bin", "anna.safetensors"):
        (tmp_path / name).write_bytes(pickle.dumps(Trap()))
    with pytest.raises(AdapterError, match=r"is a pickle.*proteus-deploy convert"):
        read_adapter(tmp_path / "anna.bin")
    with pytest.raises(AdapterError, match="can't be read as safetensors"):
        read_adapter(tmp_path / "anna.safetensors")
    with pytest.raises(AdapterError, match="is not there"):
        read_adapter(tmp_path / "absent.safetensors")
    (tmp_path / "anna.safetensors").unlink()
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(AdapterError, match=r"only a pickle \(adapter_model.bin\)"):
        read_adapter(tmp_path)


def test_flags(make_adapter: Callable[..., Adapter], tmp_path: Path) -> None:
    file = tmp_path / "a:b.safetensors"
    save_adapter(make_adapter(gate=TimestepGate(0, 250)), file)
    plain, scaled, gated = adapters_of([f"{file}", f"{file}:0.5", f"{file}:-1e-1@100-900"])
    assert (plain.scale, scaled.scale, gated.scale) == (1.0, 0.5, -0.1)
    assert (plain.active_gate, gated.active_gate) == (TimestepGate(0, 250), TimestepGate(100, 900))
    with pytest.raises(AdapterError, match="0 <= low < high"):
        adapters_of([f"{file}@900-100"])
    with pytest.raises(InputError, match="write FILE"):
        adapters_of([f"{file}:1.2.3"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda adapter: AdapterUse(adapter, float("nan")), "must be a finite number"),
        (lambda adapter: AdapterUse(adapter, 1000), "within 100"),
        (lambda adapter: AdapterUse(adapter, True), "must be a finite number"),
        (lambda adapter: AdapterUse("anna.safetensors"), "pass what read_adapter"),  # type: ignore[arg-type]
        (lambda adapter: AdapterUse(adapter, gate=(0, 250)), "pass TimestepGate"),  # type: ignore[arg-type]
        (lambda adapter: TimestepGate(0, 250.0), "whole timesteps"),  # type: ignore[arg-type]
        (lambda adapter: Adapter({"proj_out": next(iter(adapter.factors.values()))}), "adapters change"),
    ],
)
def test_values(make_adapter: Callable[..., Adapter], make: Callable[[Adapter], Any], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        make(make_adapter())


def test_factors_of_another_precision_are_equal_bits(tmp_path: Path) -> None:
    adapter = Adapter({MODULE: Factors(torch.ones(2, 8).bfloat16(), torch.ones(8, 2).bfloat16())})
    save_adapter(adapter, tmp_path / "a.safetensors")
    assert read_adapter(tmp_path / "a.safetensors").hash == adapter.hash
