"""Adapters on disk: safetensors as diffusers and PEFT write them, with our metadata in the header.

Read are diffusers' files (`transformer.<module>.lora_A.weight`, or the older `.lora.down.weight`), PEFT's
(`base_model.model.<module>.lora_A.weight`, with adapter_config.json beside them) and those that
`save_adapter` writes, which are diffusers' with one header field more. Never a pickle.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proteus_deploy._files import atomic_file
from proteus_deploy.adapters.adapter import Adapter, Factors, TimestepGate, module_place
from proteus_deploy.errors import AdapterError
from proteus_deploy.model.config import shortened
from proteus_deploy.weights import PICKLE_SUFFIXES, read_json

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["parse_adapter", "read_adapter", "save_adapter"]

_MAX_BYTES = 4 << 30  # rank 512 of the published size, in float32, is half of it
_OURS = "proteus_adapter"  # fields of the safetensors header
_DIFFUSERS = "lora_adapter_metadata"
_SCHEMA_VERSION = 1
_FILE_NAMES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
_PREFIX = re.compile(
    r"^(?:base_model\.model\.)?(?:transformer\.(?=transformer_blocks|\w+\.)|diffusion_model\.)?"
)
_FACTOR = re.compile(r"(.+?)\.(?:lora_(A|B)(?:\.default)?|lora\.(down|up)|lora_(down|up))\.weight")


def read_adapter(path: str | Path) -> Adapter:
    """A file, or a folder as PEFT and diffusers save it.

    Raises AdapterError naming the file, what is wrong with it and the way out.
    """
    file = _find(Path(path))
    tensors, header = _read(file)
    try:
        ours = _our_metadata(header)
        factors = _factors(tensors, _Scales(_lora_config(header, beside=file)))
        return Adapter(factors, **ours, name=file.stem if file.name not in _FILE_NAMES else file.parent.name)
    except AdapterError as error:
        raise AdapterError(f"{file}: {error}") from error


def parse_adapter(data: bytes, *, name: str) -> Adapter:
    """The adapter in the bytes of a safetensors file. name: its own, and in messages. Raises AdapterError."""
    import safetensors.torch
    from safetensors import SafetensorError

    try:
        tensors = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
    except (SafetensorError, ValueError, KeyError) as error:
        raise AdapterError(
            f"{name} can't be read as safetensors ({error}); it is damaged, incomplete or another format"
        ) from error
    try:
        factors = _factors(tensors, _Scales(_lora_config(header, beside=None)))
        return Adapter(factors, **_our_metadata(header), name=name)
    except AdapterError as error:
        raise AdapterError(f"{name}: {error}") from error


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
        "schema_version": _SCHEMA_VERSION,
        "gate": [adapter.gate.low, adapter.gate.high],
        "base": adapter.base,
        "person": adapter.person,
    }
    header = {
        "format": "pt",
        _DIFFUSERS: json.dumps({f"transformer.{key}": value for key, value in lora.items()}, sort_keys=True),
        _OURS: json.dumps(ours, sort_keys=True),
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
            f"{path} is a pickle, which can run code when it is opened; convert it once with: "
            f"proteus-deploy convert {path}"
        )
    if path.stat().st_size > _MAX_BYTES:
        raise AdapterError(f"{path} has {path.stat().st_size} bytes; adapters of more than 4 GiB aren't read")
    return path


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as handle:
            return {key: handle.get_tensor(key) for key in handle.keys()}, handle.metadata() or {}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise AdapterError(
            f"{file} can't be read as safetensors ({error}); it is damaged, incomplete or another format"
        ) from error


def _our_metadata(header: Mapping[str, str]) -> dict[str, Any]:
    """Keyword arguments of `Adapter`; nothing for a file that others wrote."""
    if _OURS not in header:
        return {}
    document = _json(_OURS, header[_OURS])
    if document.get("schema_version") != _SCHEMA_VERSION:
        raise AdapterError(
            f"{_OURS} has schema_version {shortened(document.get('schema_version'))}; this release reads "
            f"{_SCHEMA_VERSION}"
        )
    gate = document.get("gate")
    if not isinstance(gate, list) or len(gate) != 2:
        raise AdapterError(f"{_OURS}: gate is {shortened(gate)}; it must be [lowest, end) in timesteps")
    texts = {}
    for key in ("base", "person"):
        texts[key] = document.get(key)
        if not isinstance(texts[key], str | None):
            raise AdapterError(f"{_OURS}: {key} is {shortened(texts[key])}; it must be text or null")
    return {"gate": TimestepGate(*gate), **texts}


def _lora_config(header: Mapping[str, str], *, beside: Path | None) -> dict[str, Any]:
    """PEFT's LoraConfig as far as it is given, in the header or beside a file of PEFT's."""
    config: dict[str, Any] = {}
    if _DIFFUSERS in header:
        config = _json(_DIFFUSERS, header[_DIFFUSERS])
        config = {key.removeprefix("transformer."): value for key, value in config.items()}
    elif beside is not None and beside.name == _FILE_NAMES[0] and (file := _config_of(beside)).is_file():
        config = read_json(file, error=AdapterError)
    if config.get("use_dora"):
        raise AdapterError("it is a DoRA, which scales whole columns too; only plain LoRA is read")
    if config.get("peft_type") not in (None, "LORA"):
        raise AdapterError(f"peft_type is {shortened(config['peft_type'])}; only LORA is read")
    return config


def _config_of(file: Path) -> Path:
    return file.parent / "adapter_config.json"


def _json(name: str, text: str) -> dict[str, Any]:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"the header's {name} is not readable JSON ({error})") from error
    if not isinstance(document, dict):
        raise AdapterError(f"the header's {name} is {shortened(document)}; it must be an object")
    return document


class _Scales:
    """alpha / r of each module, or alpha / sqrt(r), as PEFT computes it; 1 where no alpha is given."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._alpha = config.get("lora_alpha")
        patterns = config.get("alpha_pattern") or {}
        if not isinstance(patterns, dict):
            raise AdapterError(f"alpha_pattern is {shortened(patterns)}; it must be an object")
        self._patterns = patterns
        self._square_root = bool(config.get("use_rslora"))

    def of(self, module: str, rank: int, own: Tensor | None) -> float:
        alpha = own.item() if own is not None and own.numel() == 1 else self._alpha
        for name, value in self._patterns.items():
            if module == name or module.endswith(f".{name}"):
                alpha = value
        if alpha is None:
            return 1.0
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise AdapterError(f"alpha of {module} is {shortened(alpha)}; it must be a finite number")
        return alpha / (math.sqrt(rank) if self._square_root else rank)


def _factors(tensors: Mapping[str, Tensor], scales: _Scales) -> dict[str, Factors]:
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
        halves.setdefault(module, {})[half] = tensor
    factors = {}
    for module, both in sorted(halves.items()):
        if len(both) != 2:
            missing = "lora_A" if "up" in both else "lora_B"
            raise AdapterError(f"{module} has no {missing}.weight; the file is incomplete")
        scale = scales.of(
            module, max(both["down"].shape[0], 1) if both["down"].ndim else 1, alphas.get(module)
        )
        factors[module] = Factors(both["down"], both["up"] if scale == 1.0 else both["up"] * scale)
    return factors
