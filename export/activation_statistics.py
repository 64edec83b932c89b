"""What calibration keeps of the inputs of linear layers and of attention: a fixed size, whatever was run.

Axes: C channels of an input (for attention operands heads times head size, heads slowest), G groups of
timesteps, BINS classes of |x|.

The classes are cut from the bits of a float32: its exponent and the top four bits of its mantissa, so each
octave has 16 classes of equal width, at most 1/16 wide relative to their values. No logarithm is computed,
hence the same tensor is counted the same way on every machine.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from proteus_deploy._files import atomic_directory, sha256_of, write_json
from proteus_deploy.errors import InputError
from proteus_deploy.weights import read_json

__all__ = ["BINS", "ActivationStatistics", "LayerStatistics", "bin_of", "bin_upper_edge"]

FORMAT = 1
LOWEST_EXPONENT, HIGHEST_EXPONENT = -24, 24  # class 0 holds |x| < 2^-24, the last one |x| >= 2^24
_PER_OCTAVE_BITS = 4
BINS = (HIGHEST_EXPONENT - LOWEST_EXPONENT << _PER_OCTAVE_BITS) + 2
_MANTISSA_BITS, _EXPONENT_BIAS = 23, 127
_FIRST = (LOWEST_EXPONENT + _EXPONENT_BIAS) << _PER_OCTAVE_BITS  # float32's own number of our class 1
_JSON, _TENSORS = "statistics.json", "statistics.safetensors"
_DTYPES = {"amax": torch.float32, "mean_abs": torch.float32, "histogram": torch.int64, "rows": torch.int64}


@dataclass(frozen=True, eq=False)
class LayerStatistics:
    """Of one input, G timestep groups: how large its C channels get.

    amax: float32 [G, C], the largest |x|; 0 in a group that no row fell into.
    mean_abs: float32 [G, C], the mean of |x| over rows (tokens times batch).
    histogram: int64 [G, BINS], how many |x| of all channels are in each class.
    rows: int64 [G], how many rows were seen.
    """

    amax: Tensor
    mean_abs: Tensor
    histogram: Tensor
    rows: Tensor

    @property
    def channels(self) -> int:
        return int(self.amax.shape[1])


@dataclass(frozen=True, eq=False)
class ActivationStatistics:
    """Statistics by layer, "graph/module" as in the state dict: "denoiser/transformer_blocks.0.attn1.to_q".

    Operands of the denoiser's attention are "denoiser/transformer_blocks.0.attn1.query", ".key" and ".value",
    as they enter the product: normed and turned to their positions.

    groups: the lowest timestep of each group, rising from 0. A layer has as many groups, or one where its
    network sees no timestep.
    provenance: {"checkpoint": hash, "settings": {…}, "cases": [{…}, …]}; JSON.
    """

    layers: Mapping[str, LayerStatistics]
    groups: tuple[int, ...]
    provenance: Mapping[str, Any]

    def layer(self, name: str) -> LayerStatistics:
        """Raises InputError for a layer that was not seen."""
        if name not in self.layers:
            raise InputError(
                f"the statistics say nothing of {name!r}; calibrate the checkpoint that it belongs to "
                f"(they hold {len(self.layers)} layers of "
                f"{', '.join(sorted({key.partition('/')[0] for key in self.layers}))})"
            )
        return self.layers[name]

    def amax(self, layer: str) -> Tensor:
        """float32 [C]: the largest |x| of each channel over all groups. Raises InputError."""
        return self.layer(layer).amax.amax(0)

    def mean_abs(self, layer: str) -> Tensor:
        """float32 [C]: the mean |x| of each channel over all rows of all groups. Raises InputError."""
        found = self.layer(layer)
        return _weighted_mean(found.mean_abs, found.rows)

    def percentile(self, layer: str, share: float, *, group: int | None = None) -> float:
        """The least upper edge of a class with at least that share (0 to 1) of all |x| at or below it.

        Never above the largest |x|, and 0 for a group that saw nothing. So it is at most 1/16 too large.
        group: None for all of them. Raises InputError for an unknown layer or group, or another share.
        """
        found = self.layer(layer)
        if not 0 < share <= 1:
            raise InputError(f"share is {share}; it is above 0 and at most 1 (0.999 leaves out a thousandth)")
        groups = int(found.rows.shape[0])
        if group is not None and not 0 <= group < groups:
            raise InputError(f"group is {group}; {layer} has the groups 0 to {groups - 1}")
        counts = found.histogram.sum(0) if group is None else found.histogram[group]
        largest = float(found.amax.max() if group is None else found.amax[group].max())
        total = int(counts.sum())
        if not total:
            return 0.0
        below = counts.cumsum(0).to(torch.float64)
        index = int(torch.searchsorted(below, torch.tensor(share * total, dtype=torch.float64)))
        return min(bin_upper_edge(min(index, BINS - 1)), largest)

    @property
    def hash(self) -> str:
        """sha256 (hex) of everything that is kept, in the order of the layers' names."""
        digest = hashlib.sha256(json.dumps(self._document(), sort_keys=True).encode())
        for key, value in self._tensors().items():
            digest.update(key.encode())
            digest.update(value.numpy().tobytes())
        return digest.hexdigest()

    @classmethod
    def merge(cls, parts: Sequence[ActivationStatistics]) -> ActivationStatistics:
        """Those of several runs as one, in the order given, so that equal parts give equal bytes.

        Raises InputError for no parts, and for parts of another checkpoint, other settings or layers.
        """
        if not parts:
            raise InputError("there are no statistics to merge; calibrate at least one case")
        first = parts[0]
        for part in parts[1:]:
            _check_alike(first, part)
        layers = {name: _merged([part.layers[name] for part in parts]) for name in sorted(first.layers)}
        cases = [case for part in parts for case in part.provenance.get("cases", [])]
        return cls(layers, first.groups, {**first.provenance, "cases": cases})

    def save(self, folder: Path, *, overwrite: bool = False) -> None:
        """Write statistics.json and statistics.safetensors into a new folder: whole or absent.

        Raises InputError where the folder is there, not empty, and `overwrite` is not set.
        """
        from safetensors.torch import save_file

        with atomic_directory(folder, replace=overwrite) as temporary:
            save_file(self._tensors(), temporary / _TENSORS)
            (temporary / _TENSORS).chmod(0o644)  # safetensors leaves it to its owner alone
            document = self._document() | {"sha256": {_TENSORS: sha256_of(temporary / _TENSORS)}}
            write_json(temporary / _JSON, document)

    @classmethod
    def load(cls, folder: Path) -> ActivationStatistics:
        """Raises InputError that names the file which is missing, damaged or of another format."""
        file, tensors = folder / _JSON, folder / _TENSORS
        document = read_json(file, error=InputError)
        if document.get("format") != FORMAT:
            raise InputError(
                f"{file} has the format {document.get('format')!r}; this version reads {FORMAT}: calibrate "
                "again"
            )
        names, groups = document.get("layers"), document.get("groups")
        if (
            not isinstance(names, list)
            or not all(isinstance(name, str) for name in names)
            or not isinstance(groups, list)
            or not groups
            or not all(type(value) is int for value in groups)
            or not isinstance(document.get("provenance"), dict)
            or not isinstance(document.get("sha256"), dict)
        ):
            raise InputError(f"{file} is no statistics document; calibrate again")
        if not tensors.is_file():
            raise InputError(f"{tensors} is missing; copy the whole folder, or calibrate again")
        if sha256_of(tensors) != document["sha256"].get(_TENSORS):
            raise InputError(f"{tensors} is not the file that {file.name} belongs to; calibrate again")
        found = _read_tensors(tensors)
        layers = {name: _layer_of(found, name, len(groups), tensors) for name in names}
        return cls(layers, tuple(groups), document["provenance"])

    def _document(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "layers": sorted(self.layers),
            "groups": list(self.groups),
            "provenance": dict(self.provenance),
        }

    def _tensors(self) -> dict[str, Tensor]:
        return {
            f"{name}:{part}": getattr(self.layers[name], part).contiguous()
            for name in sorted(self.layers)
            for part in _DTYPES
        }


def bin_of(magnitude: Tensor) -> Tensor:
    """Classes (int32, 0 to BINS - 1) of |x|, float32, finite, of any shape."""
    bits = magnitude.view(torch.int32) >> (_MANTISSA_BITS - _PER_OCTAVE_BITS)
    return (bits - (_FIRST - 1)).clamp_(0, BINS - 1)


def bin_upper_edge(index: int) -> float:
    """What all |x| of a class are below; infinity for the last one."""
    if index >= BINS - 1:
        return float("inf")
    octave, part = divmod(index, 1 << _PER_OCTAVE_BITS)
    return float(2.0 ** (LOWEST_EXPONENT + octave) * (1 + part / (1 << _PER_OCTAVE_BITS)))


def _weighted_mean(means: Tensor, rows: Tensor) -> Tensor:
    """float32 [C] of means [G, C] over rows [G]; the sum is float64, in the order of the groups."""
    total = (means.double() * rows[:, None]).sum(0)
    return (total / max(int(rows.sum()), 1)).float()


def _check_alike(first: ActivationStatistics, other: ActivationStatistics) -> None:
    for what in ("checkpoint", "settings"):
        one, two = first.provenance.get(what), other.provenance.get(what)
        if one != two:
            raise InputError(f"statistics of {what} {one!r} and {two!r} can't be merged; calibrate anew")
    if first.groups != other.groups:
        raise InputError(f"statistics of timestep groups {first.groups} and {other.groups} can't be merged")
    strange = sorted(set(first.layers) ^ set(other.layers))
    if strange:
        raise InputError(f"{strange[0]!r} is only in one of the statistics to merge; calibrate anew")
    for name, layer in first.layers.items():
        if layer.amax.shape != other.layers[name].amax.shape:
            raise InputError(
                f"{name} is {list(layer.amax.shape)} and {list(other.layers[name].amax.shape)} (groups, "
                "channels) in statistics to merge; calibrate anew"
            )


def _merged(parts: Sequence[LayerStatistics]) -> LayerStatistics:
    rows = torch.stack([part.rows for part in parts])
    means = torch.stack([part.mean_abs for part in parts])
    weighted = (means.double() * rows[:, :, None]).sum(0) / rows.sum(0).clamp(min=1)[:, None]
    return LayerStatistics(
        torch.stack([part.amax for part in parts]).amax(0),
        weighted.float(),
        torch.stack([part.histogram for part in parts]).sum(0),
        rows.sum(0),
    )


def _read_tensors(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} can't be read as safetensors ({error}); calibrate again") from error


def _layer_of(found: Mapping[str, Tensor], name: str, groups: int, file: Path) -> LayerStatistics:
    values: dict[str, Tensor] = {}
    for field in fields(LayerStatistics):
        value = found.get(f"{name}:{field.name}")
        if value is None:
            raise InputError(f"{file} has no {field.name} of {name}; calibrate again")
        values[field.name] = value
    layer = LayerStatistics(**values)
    count = layer.rows.shape[0] if layer.rows.ndim == 1 else 0
    channels = layer.amax.shape[-1] if layer.amax.ndim == 2 else 0
    shapes = {
        "amax": (count, channels),
        "mean_abs": (count, channels),
        "histogram": (count, BINS),
        "rows": (count,),
    }
    for part, value in values.items():
        if tuple(value.shape) != shapes[part] or value.dtype != _DTYPES[part] or count not in (1, groups):
            raise InputError(
                f"{file}: {part} of {name} is {value.dtype} {list(value.shape)}, which fits no layer with "
                f"{groups} groups; calibrate again"
            )
        if not bool(torch.isfinite(value).all()) or bool((value < 0).any()):
            raise InputError(f"{file}: {part} of {name} holds a negative number or NaN; calibrate again")
    return layer
