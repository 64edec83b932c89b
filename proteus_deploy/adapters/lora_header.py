"""What stands before the numbers of a LoRA file: names, shapes, metadata, checked before any number is read.

An upload comes from a stranger: everything here is bounded, and costs no more than the file is long.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import IO, Any

from proteus_deploy.adapters.adapter import TimestepGate
from proteus_deploy.errors import AdapterError
from proteus_deploy.model.config import shortened

__all__ = ["DIFFUSERS", "OURS", "SCHEMA_VERSION", "Scales", "lora_config", "our_metadata", "read_lora_header"]

OURS = "proteus_adapter"  # fields of the safetensors header
DIFFUSERS = "lora_adapter_metadata"
SCHEMA_VERSION = 1
_MAX_HEADER_BYTES = 1 << 20  # 42 blocks of four projections take a tenth of it
_DTYPES = ("F64", "F32", "F16", "BF16")
_MAX_SIZE = 1 << 20
_HASH = re.compile(r"[0-9a-f]{64}")
_PLAIN = re.compile(r"[A-Za-z0-9_.]+")


def read_lora_header(stream: IO[bytes]) -> dict[str, str]:
    """The metadata of a safetensors file that is open at its beginning.

    Raises AdapterError where the header is damaged, too long, or has a tensor that no LoRA has.
    """
    length = int.from_bytes(stream.read(8), "little")
    if length > _MAX_HEADER_BYTES:
        raise AdapterError(
            f"it can't be read as safetensors: its header would have {length} bytes, and that of an adapter "
            f"has {_MAX_HEADER_BYTES} at most"
        )
    try:
        document = json.loads(stream.read(length))
    except (ValueError, RecursionError) as error:
        raise AdapterError(
            f"it can't be read as safetensors ({error}); it is damaged, incomplete or another format"
        ) from error
    if not isinstance(document, dict):
        raise AdapterError(f"it can't be read as safetensors: its header is {shortened(document)}")
    metadata = document.pop("__metadata__", None) or {}
    for key, record in document.items():
        _check_tensor(key, record)
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise AdapterError("its __metadata__ must be an object of texts")
    return metadata


def _check_tensor(key: str, record: Any) -> None:
    dtype, shape = (record.get("dtype"), record.get("shape")) if isinstance(record, dict) else (None, None)
    if dtype not in _DTYPES:
        raise AdapterError(
            f"{shortened(key)} has numbers of type {shortened(dtype)}; factors are {', '.join(_DTYPES)}, "
            "not whole numbers and not 8-bit ones"
        )
    sizes: list[Any] = shape if isinstance(shape, list) else [None]
    whole = all(isinstance(size, int) for size in sizes)
    if not whole or len(sizes) > 2 or not all(1 <= size <= _MAX_SIZE for size in sizes):
        raise AdapterError(
            f"{shortened(key)} has the shape {shortened(shape)}; factors are [r, d] and [d, r]"
        )


def our_metadata(header: Mapping[str, str]) -> dict[str, Any]:
    """Keyword arguments of `Adapter`; nothing for a file that others wrote. Raises AdapterError."""
    if OURS not in header:
        return {}
    document = _json(OURS, header[OURS])
    if document.get("schema_version") != SCHEMA_VERSION:
        raise AdapterError(
            f"{OURS} has schema_version {shortened(document.get('schema_version'))}; this release reads "
            f"{SCHEMA_VERSION}"
        )
    gate = document.get("gate")
    if not isinstance(gate, list) or len(gate) != 2:
        raise AdapterError(f"{OURS}: gate is {shortened(gate)}; it must be [lowest, end) in timesteps")
    hashes = {key: document.get(key) for key in ("base", "person")}
    for key, value in hashes.items():
        if value is not None and not (isinstance(value, str) and _HASH.fullmatch(value)):
            raise AdapterError(f"{OURS}: {key} is {shortened(value)}; it must be a sha256 in hex, or null")
    return {"gate": TimestepGate(*gate), **hashes}


def lora_config(header: Mapping[str, str], beside: Mapping[str, Any] | None) -> dict[str, Any]:
    """PEFT's LoraConfig as far as it is given: in diffusers' header, or `beside`, in a file of PEFT's.

    Raises AdapterError for kinds that are no plain LoRA.
    """
    config = dict(beside or {})
    if DIFFUSERS in header:
        config = {
            key.removeprefix("transformer."): value
            for key, value in _json(DIFFUSERS, header[DIFFUSERS]).items()
        }
    if config.get("use_dora"):
        raise AdapterError("it is a DoRA, which scales whole columns too; only plain LoRA is read")
    if config.get("peft_type") not in (None, "LORA"):
        raise AdapterError(f"peft_type is {shortened(config['peft_type'])}; only LORA is read")
    return config


def _json(name: str, text: str) -> dict[str, Any]:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"the header's {name} is not readable JSON ({error})") from error
    if not isinstance(document, dict):
        raise AdapterError(f"the header's {name} is {shortened(document)}; it must be an object")
    return document


class Scales:
    """alpha / r of each module, or alpha / sqrt(r), as PEFT computes it; 1 where no alpha is given.

    Keys of `alpha_pattern` are regular expressions in PEFT, the first that matches the end of a name counts;
    read are those that are plain names, since a stranger's expression can take for ever.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._alpha = config.get("lora_alpha")
        patterns = config.get("alpha_pattern") or {}
        if not isinstance(patterns, dict):
            raise AdapterError(f"alpha_pattern is {shortened(patterns)}; it must be an object")
        for key in patterns:
            if not _PLAIN.fullmatch(key):
                raise AdapterError(
                    f"alpha_pattern has {shortened(key)}, an expression; only ends of names are read: save "
                    "it again with a name for each module"
                )
        self._patterns = {key: (place, value) for place, (key, value) in enumerate(patterns.items())}
        self._square_root = bool(config.get("use_rslora"))

    @property
    def known(self) -> bool:
        """Whether an alpha was given."""
        return self._alpha is not None

    def of(self, module: str, rank: int, own: float | None) -> float:
        """own: the alpha that stands beside the factors in older files. Raises AdapterError for no number."""
        found = [self._patterns[end] for end in _ends(module) if end in self._patterns]
        alpha = min(found)[1] if found else self._alpha if own is None else own
        if alpha is None:
            return 1.0
        try:
            number = math.nan if isinstance(alpha, bool | str) else float(alpha)
        except (TypeError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            raise AdapterError(f"alpha of {module} is {shortened(alpha)}; it must be a finite number")
        return number / (math.sqrt(rank) if self._square_root else rank)


def _ends(module: str) -> Iterator[str]:
    """a.b.c -> a.b.c, b.c, c."""
    while module:
        yield module
        module = module.partition(".")[2]
