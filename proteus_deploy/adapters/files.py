"""Adapters on disk: safetensors as diffusers and PEFT write them, with our metadata in the header.

Read are diffusers' files (`transformer.<module>.lora_A.weight`, or the older `.lora.down.weight`), PEFT's
(`base_model.model.<module>.lora_A.weight`, with adapter_config.json beside them) and those that
`save_adapter` writes, which are diffusers' with one header field more. Never a pickle.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proteus_deploy._files import atomic_file
from proteus_deploy.adapters.adapter import Adapter, Factors, module_place
from proteus_deploy.adapters.lora_header import (
    DIFFUSERS,
    OURS,
    SCHEMA_VERSION,
    Scales,
    lora_config,
    our_metadata,
    read_lora_header,
)
from proteus_deploy.errors import AdapterError
from proteus_deploy.model.config import shortened
from proteus_deploy.weights import PICKLE_SUFFIXES, read_json

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["parse_adapter", "read_adapter", "save_adapter"]

_MAX_BYTES = 4 << 30  # rank 512 of the published size, in float32, is half of it
_PEFTS = "base_model.model."
_DAMAGED = "it is damaged, incomplete or another format"
_FILE_NAMES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
_PREFIX = re.compile(r"^(?:base_model\.model\.)?(?:transformer\.|diffusion_model\.)?")
_FACTOR = re.compile(r"(.+?)\.(?:lora_(A|B)(?:\.default)?|lora\.(down|up)|lora_(down|up))\.weight")


def read_adapter(path: str | Path) -> Adapter:
    """A file, or a folder as PEFT and diffusers save it.

    Raises AdapterError naming the file, what is wrong with it and the way out.
    """
    from safetensors import SafetensorError, safe_open

    file = _find(Path(path))
    beside = file.parent / "adapter_config.json"
    try:
        with file.open("rb") as stream:
            header = read_lora_header(stream)
        pefts = file.name == _FILE_NAMES[0] and beside.is_file()
        config = read_json(beside, error=AdapterError) if pefts else None
        with safe_open(file, framework="pt") as handle:
            tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118 - not a dict
        name = file.stem if file.name not in _FILE_NAMES else file.parent.name
        return _adapter(tensors, header, config, name)
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{file} can't be read as safetensors ({error}); {_DAMAGED}") from error
    except AdapterError as error:
        raise AdapterError(f"{file}: {error}") from error


def parse_adapter(data: bytes, *, name: str) -> Adapter:
    """The adapter in the bytes of a safetensors file. name: its own, and in messages. Raises AdapterError."""
    import safetensors.torch
    from safetensors import SafetensorError

    try:
        header = read_lora_header(io.BytesIO(data))
        return _adapter(safetensors.torch.load(data), header, None, name)
    except SafetensorError as error:
        raise AdapterError(f"{name} can't be read as safetensors ({error}); {_DAMAGED}") from error
    except AdapterError as error:
        text = str(error)
        named = text.startswith((f"{name}: ", f"{name} "))
        raise AdapterError(text if named else f"{name}: {text}") from error


def _adapter(
    tensors: Mapping[str, Tensor], header: Mapping[str, str], beside: Mapping[str, Any] | None, name: str
) -> Adapter:
    scales = Scales(lora_config(header, beside))
    if not scales.known and any(key.startswith(_PEFTS) for key in tensors):
        raise AdapterError(
            "PEFT keeps the scale (lora_alpha) in adapter_config.json, which is not here; read the "
            "folder that has both, with read_adapter, and write one file with save_adapter"
        )
    return Adapter(_factors(tensors, scales), **our_metadata(header), name=name)


def save_adapter(adapter: Adapter, file: Path) -> None:
    """Write `file` in diffusers' format, whole or not at all; alpha is the rank: factors are as they act."""
    import safetensors.torch

    tensors = {}
    for module, factors in adapter.factors.items():
        tensors[f"transformer.{module}.lora_A.weight"] = factors.down.detach().cpu().contiguous()
        tensors[f"transformer.{module}.lora_B.weight"] = factors.up.detach().cpu().contiguous()
    ranks = {module: factors.rank for module, factors in adapter.factors.items()}
    rank = adapter.rank
    others = {module: own for module, own in ranks.items() if own != rank}
    lora = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted(ranks),
        "rank_pattern": others,
        "alpha_pattern": others,
    }
    ours = {
        "schema_version": SCHEMA_VERSION,
        "gate": [adapter.gate.low, adapter.gate.high],
        "base": adapter.base,
        "person": adapter.person,
    }
    header = {
        "format": "pt",
        DIFFUSERS: json.dumps({f"transformer.{key}": value for key, value in lora.items()}, sort_keys=True),
        OURS: json.dumps(ours, sort_keys=True),
    }
    with atomic_file(file) as temporary:
        safetensors.torch.save_file(tensors, temporary, metadata=header)


def _find(path: Path) -> Path:
    if path.is_dir():
        found = [path / name for name in _FILE_NAMES if (path / name).is_file()]
        if not found:
            pickles = sorted(file.name for file in path.iterdir() if file.suffix in PICKLE_SUFFIXES)
            what = f"only a pickle ({pickles[0]})" if pickles else "none"
            raise AdapterError(
                f"{path} holds {what}; an adapter's folder has one of {', '.join(_FILE_NAMES)}"
            )
        return found[0]
    if not path.is_file():
        raise AdapterError(f"{path} is not there; pass an adapter's .safetensors file or its folder")
    if path.suffix in PICKLE_SUFFIXES:
        raise AdapterError(
            f"{path} is a pickle, which can run code when it is opened; convert a .pt, .pth or .bin "
            f"once with: proteus-deploy convert {path}"
        )
    if path.stat().st_size > _MAX_BYTES:
        raise AdapterError(f"{path} has {path.stat().st_size} bytes; adapters of more than 4 GiB aren't read")
    return path


def _factors(tensors: Mapping[str, Tensor], scales: Scales) -> dict[str, Factors]:
    halves: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = _PREFIX.sub("", key, count=1)
        if name.endswith(".alpha"):
            alphas[name.removesuffix(".alpha")] = tensor
            continue
        match = _FACTOR.fullmatch(name)
        if match is None:
            raise AdapterError(
                f"it holds {shortened(key)}, which is no factor of a LoRA; those end in lora_A.weight and "
                "lora_B.weight"
            )
        module, letter, old, older = match.groups()
        half = {"A": "down", "B": "up"}.get(letter) or old or older
        module_place(module, "it")
        if half in halves.setdefault(module, {}):
            raise AdapterError(f"it has the factor {half} of {module} twice, under two names")
        halves[module][half] = tensor
    if strange := alphas.keys() - halves.keys():
        raise AdapterError(f"it has an alpha of {shortened(min(strange))}, and no factors of it")
    factors = {}
    for module, both in sorted(halves.items()):
        if len(both) != 2:
            missing = "lora_A" if "up" in both else "lora_B"
            raise AdapterError(f"{module} has no {missing}.weight; the file is incomplete")
        down, up, own = both["down"], both["up"], alphas.get(module)
        if own is not None and own.numel() != 1:
            raise AdapterError(f"alpha of {module} has the shape {list(own.shape)}; it must be one number")
        rank = down.shape[0] if down.ndim else 1
        scale = scales.of(module, rank, None if own is None else own.item())
        # In half precision a small alpha over a large rank would round factors to 0.
        factors[module] = Factors(down, up if scale == 1.0 else up.float() * scale)
    return factors
