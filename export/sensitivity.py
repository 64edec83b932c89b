"""How much does a step of the denoiser change when one unit of layers alone is quantised?

The error is e² of `step_points.py`. It is measured in PyTorch with the layers of `quantized_linear.py`; a
format whose products the device has not is simulated, and the table says so.

Every value is written to a file as soon as it is known. A run that was killed goes on after the last one,
and its file has the same bytes as that of one that wasn't.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from proteus_deploy._files import write_json
from proteus_deploy.errors import InputError
from proteus_deploy.export.precision_path import EXPORTED, Option
from proteus_deploy.export.precision_units import (
    Unit,
    check_formats,
    simulated_formats,
    stored_bytes,
    unit_recipe,
    units_of,
)
from proteus_deploy.export.quantize import linear_shapes
from proteus_deploy.export.step_points import StepPoint, errors_squared, quantised_layers
from proteus_deploy.export.torch_quantizer import TorchQuantizer
from proteus_deploy.reporting import Report, no_report

if TYPE_CHECKING:
    from proteus_deploy.export.activation_statistics import ActivationStatistics
    from proteus_deploy.network_factory import NetworkFactory

__all__ = ["Sensitivity", "SensitivityTable", "measure_sensitivities"]

_FORMAT = "proteus_deploy sensitivities 1"


@dataclass(frozen=True)
class Sensitivity:
    """Of one unit in one format. by_point: e² of each point. weight_bytes: with scales and multipliers."""

    by_point: tuple[float, ...]
    weight_bytes: int

    @property
    def error_squared(self) -> float:
        return sum(self.by_point) / len(self.by_point)


@dataclass(frozen=True)
class SensitivityTable:
    """values: by pattern of the unit, then format; a format that doesn't fit a unit is left out.

    weight_size: bytes of a weight as exported. simulated: formats that were computed with the numbers that
    codes stand for.
    """

    units: tuple[Unit, ...]
    formats: tuple[str, ...]
    values: Mapping[str, Mapping[str, Sensitivity]]
    weight_size: int
    simulated: tuple[str, ...]

    def options(self, costs: Mapping[str, float] | None = None) -> dict[str, list[Option]]:
        """For `precision_path`, by pattern: as exported, and each format that fits.

        costs: of one weight in each format and `EXPORTED`; None for bytes. Raises InputError for a format
        without a cost.
        """
        for kind in (*self.formats, EXPORTED) if costs is not None else ():
            if costs is not None and kind not in costs:
                raise InputError(f"format {kind!r} has no cost; give one to each, and to {EXPORTED!r}")
        found = {}
        for unit in self.units:
            of_kind = {kind: (one.error_squared, one.weight_bytes) for kind, one in self._of(unit).items()}
            of_kind[EXPORTED] = 0.0, unit.weights * self.weight_size
            found[unit.pattern] = [
                Option(kind, error, size if costs is None else unit.weights * costs[kind])
                for kind, (error, size) in of_kind.items()
            ]
        return found

    def weight_bytes(self, kinds: Mapping[str, str]) -> int:
        """Of all units of an assignment {pattern: format or `EXPORTED`}."""
        return sum(
            unit.weights * self.weight_size
            if kinds[unit.pattern] == EXPORTED
            else self.values[unit.pattern][kinds[unit.pattern]].weight_bytes
            for unit in self.units
        )

    def reasons(self) -> dict[str, str]:
        """Why a unit stays high, by pattern, with what its formats would cost."""
        found = {}
        for unit in self.units:
            errors = ", ".join(f"{one.error_squared**0.5:.1e} as {k}" for k, one in self._of(unit).items())
            measured = f"alone it changes a step's velocity by {errors}" if errors else "no format fits it"
            found[unit.pattern] = f"measured: {measured}"
        return found

    def to_json(self) -> dict[str, Any]:
        """For result documents: error (relative L2) and bytes of each."""
        return {
            unit.pattern: {
                kind: {"error": one.error_squared**0.5, "weight_bytes": one.weight_bytes}
                for kind, one in self._of(unit).items()
            }
            for unit in self.units
        }

    def _of(self, unit: Unit) -> dict[str, Sensitivity]:
        return {kind: self.values[unit.pattern][kind] for kind in self.formats if unit.rule(kind)}


def measure_sensitivities(
    module: nn.Module,
    factory: NetworkFactory,
    points: Sequence[StepPoint],
    formats: Sequence[str],
    statistics: ActivationStatistics | None,
    file: Path,
    *,
    key: str,
    report: Report = no_report,
) -> SensitivityTable:
    """Every unit in every format, alone, on the points; what `file` holds already isn't measured again.

    module: the exact denoiser of the factory's checkpoint; it is as it was afterwards. key: of all that
    decides the values besides unit and format (checkpoint, statistics, points).
    Raises InputError for formats that need statistics where there are none, and for a file of another key or
    that isn't one; ComputationError for NaN or infinity.
    """
    check_formats(formats, statistics=statistics is not None)
    weight = next(module.parameters())
    units = units_of(linear_shapes(module))
    known = _read(file, key)
    simulated = simulated_formats(formats, statistics, weight.device)
    pairs = [(unit, kind) for unit in units for kind in formats if unit.rule(kind)]
    for number, (unit, kind) in enumerate(pairs):
        report("sensitivity of layers", number, len(pairs))
        if kind in known.get(unit.pattern, {}):
            continue
        quantizer = TorchQuantizer(unit_recipe(unit, kind), statistics, simulate=kind in simulated)
        with quantised_layers(module, factory, quantizer) as layers:
            errors = tuple(errors_squared(module, points))
            known.setdefault(unit.pattern, {})[kind] = Sensitivity(errors, stored_bytes([*layers.values()]))
        _write(file, key, known)
    report("sensitivity of layers", len(pairs), len(pairs))
    return SensitivityTable(units, tuple(formats), known, weight.element_size(), simulated)


def _read(file: Path, key: str) -> dict[str, dict[str, Sensitivity]]:
    if not file.exists():
        return {}
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        of_ours = document["format"] == _FORMAT
        found = {
            pattern: {
                kind: Sensitivity(tuple(map(float, one["by_point"])), int(one["weight_bytes"]))
                for kind, one in formats.items()
            }
            for pattern, formats in document["values"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{file} is no readable file of sensitivities ({error!r}); remove it, or name another one "
            "(--sensitivities)"
        ) from error
    if not of_ours:
        raise InputError(
            f"{file} has format {document['format']!r}, not {_FORMAT!r}; remove it, or name another"
        )
    if document.get("key") != key:
        raise InputError(
            f"{file} holds sensitivities of another checkpoint, calibration, cases or settings (key "
            f"{document.get('key')!r}, these have {key!r}); name another file (--sensitivities)"
        )
    return found


def _write(file: Path, key: str, values: Mapping[str, Mapping[str, Sensitivity]]) -> None:
    document = {
        pattern: {
            kind: {"by_point": list(one.by_point), "weight_bytes": one.weight_bytes}
            for kind, one in formats.items()
        }
        for pattern, formats in values.items()
    }
    write_json(file, {"format": _FORMAT, "key": key, "values": document})
