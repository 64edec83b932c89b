"""Every error that a user of the library can meet.

    ProteusError
    ├── InputError          the request, file or flag is wrong          exit code 2
    │   ├── CheckpointError     a checkpoint folder or weight file
    │   ├── BundleError         an exported bundle: manifest, file, version
    │   ├── AdapterError        a low-rank adapter: file, shapes, another base
    │   ├── PhotoError          a reference photo: unreadable, no face, …
    │   └── BackendError        a backend, package or device that is not here
    ├── CheckFailed         a comparison or a quality gate said no      exit code 1
    ├── ComputationError    a network gave NaN or infinity              exit code 1
    └── Cancelled           the caller asked to stop                    exit code 1

A message names the value found, the rule it breaks and the way out.
"""

from __future__ import annotations

__all__ = [
    "AdapterError",
    "BackendError",
    "BundleError",
    "Cancelled",
    "CheckFailed",
    "CheckpointError",
    "ComputationError",
    "InputError",
    "PhotoError",
    "ProteusError",
]


class ProteusError(Exception):
    """Base of all errors raised on purpose by proteus_deploy."""

    exit_code = 1


class InputError(ProteusError, ValueError):
    """What the caller passed in is wrong; the message says how to mend it."""

    exit_code = 2


class CheckpointError(InputError):
    """A checkpoint folder or one of its files is missing, malformed or of another architecture."""


class BundleError(InputError):
    """A bundle is incomplete, altered, from another version, or not a bundle."""


class AdapterError(InputError):
    """A low-rank adapter is unreadable, broken, for another model, or larger than a bundle takes."""


class PhotoError(InputError):
    """A reference photo can't be used: unreadable, too large, without a usable face."""


class BackendError(InputError):
    """The backend asked for can't run here: package absent, device absent, stage unsupported."""


class CheckFailed(ProteusError):
    """A verification or a gate ran to its end and the figures are outside their bounds."""


class ComputationError(ProteusError):
    """A network computed NaN or infinity; what follows from it would be worthless."""


class Cancelled(ProteusError):
    """The caller's cancel event was set; the work stopped at the next boundary."""
