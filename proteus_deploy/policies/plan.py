"""The plan of a request: which policies run, with which numbers. Frozen, and JSON on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from proteus_deploy._files import write_json
from proteus_deploy.errors import InputError
from proteus_deploy.model.config import shortened
from proteus_deploy.policies.guided_steps import GuidanceInterval, GuidanceReuse
from proteus_deploy.policies.identity_gate import IdentityGate
from proteus_deploy.policies.step_cache import EasyCache, MagCache, StepCache, TeaCache
from proteus_deploy.policies.step_schedule import StepSchedule
from proteus_deploy.weights import read_json

SCHEMA_VERSION = 1
_KIND = "proteus_deploy plan"
_STEP_CACHES: dict[str, type[StepCache]] = {
    cache.kind: cache for cache in (EasyCache, MagCache, TeaCache, StepSchedule)
}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Each policy is off when it is None; a plan of Nones is the exact computation, as no plan is.

    Raises InputError for a value that is no policy of its kind.
    """

    step_cache: StepCache | None = None
    guidance_interval: GuidanceInterval | None = None
    guidance_reuse: GuidanceReuse | None = None
    identity_gate: IdentityGate | None = None

    def __post_init__(self) -> None:
        if self.step_cache is not None and type(self.step_cache) not in _STEP_CACHES.values():
            names = ", ".join(cache.__name__ for cache in _STEP_CACHES.values())
            raise InputError(
                f"plan: step_cache is {shortened(self.step_cache)}; pass one of {names}, or None"
            )
        for name, kind in _POLICIES.items():
            value = getattr(self, name)
            if not isinstance(value, kind | None):
                raise InputError(
                    f"plan: {name} is {shortened(value)}; pass an instance of {kind.__name__}, or None"
                )

    def check(self, *, steps: int, guided: bool) -> None:
        """Raise InputError when the plan doesn't fit a request of so many steps, guided or not."""
        if self.step_cache is not None:
            self.step_cache.check_steps(steps)
        for name in ("guidance_interval", "guidance_reuse"):
            if getattr(self, name) is not None and not guided:
                raise InputError(
                    f"the plan has {name}, and guidance_scale is 1 or less, which switches guidance off; "
                    f"raise guidance_scale or leave {name} out of the plan"
                )

    def to_json(self) -> dict[str, Any]:
        """What `plan_from_json` reads; policies that are off are left out."""
        document: dict[str, Any] = {"kind": _KIND, "schema_version": SCHEMA_VERSION}
        for field in fields(self):
            policy = getattr(self, field.name)
            if policy is not None:
                document[field.name] = asdict(policy)
        if self.step_cache is not None:
            document["step_cache"]["kind"] = self.step_cache.kind
        return document

    def save(self, file: Path) -> None:
        """Write the plan as JSON, whole or not at all."""
        write_json(file, self.to_json())


_POLICIES: dict[str, type] = {
    "guidance_interval": GuidanceInterval,
    "guidance_reuse": GuidanceReuse,
    "identity_gate": IdentityGate,
}


def read_plan(file: Path) -> Plan:
    """A plan from a JSON file. Raises InputError naming the file, the field, its value and the rule."""
    return plan_from_json(read_json(file, error=InputError), source=str(file))


def plan_from_json(document: Mapping[str, Any], *, source: str = "plan") -> Plan:
    """The plan in a document that `Plan.to_json` made or a person wrote.

    Raises InputError naming `source`, the field, its value and the rule.
    """
    if not isinstance(document, Mapping):
        raise InputError(f"{source}: a plan is {shortened(document)}; it must be a JSON object")
    for field, expected in (("kind", _KIND), ("schema_version", SCHEMA_VERSION)):
        if document.get(field, expected) != expected:
            raise InputError(
                f"{source}: {field!r} is {shortened(document[field])}; this release reads {expected!r}"
            )
    known = [field.name for field in fields(Plan)]
    _refuse_unknown(source, document, [*known, "kind", "schema_version"])
    try:
        policies = {name: _policy(name, document[name]) for name in known if document.get(name) is not None}
        return Plan(**policies)
    except InputError as error:
        raise InputError(f"{source}: {error}") from error


def _policy(name: str, document: Any) -> Any:
    if not isinstance(document, Mapping):
        raise InputError(f"{name} is {shortened(document)}; it must be a JSON object")
    kind: Any = _POLICIES.get(name)
    arguments = dict(document)
    if kind is None:
        chosen = arguments.pop("kind", None)
        if not isinstance(chosen, str) or chosen not in _STEP_CACHES:
            raise InputError(f"{name}: kind is {shortened(chosen)}; choose from {', '.join(_STEP_CACHES)}")
        kind = _STEP_CACHES[chosen]
    _refuse_unknown(name, arguments, [field.name for field in fields(kind)])
    try:
        return kind(**arguments)
    except TypeError as error:  # a parameter without a default is missing; Python's message names it
        raise InputError(f"{name}: {str(error).partition('() ')[2]}; add it") from error


def _refuse_unknown(owner: str, document: Mapping[str, Any], known: list[str]) -> None:
    if unknown := [key for key in document if key not in known]:
        raise InputError(f"{owner}: there is no {shortened(unknown[0])}; it has {', '.join(known)}")
