"""What a quantised export does to each layer, as data: a JSON file, read field by field.

A recipe names, for each graph, rules over the names of its Linear layers (those of the module, which are
the state dict's without `.weight`). A layer that `keep` names stays high; else the first rule whose
pattern matches decides; a layer that no rule names stays high. Patterns are shell globs, in which `*`
also runs over dots; `{first}` and `{last}` stand for the first and last index of a list of blocks.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, get_args

from proteus_deploy.errors import InputError
from proteus_deploy.export.json_fields import Fields

WeightFormat = Literal["none", "int8", "fp8_e4m3", "int4", "nvfp4"]
ActivationFormat = Literal["none", "int8", "fp8_e4m3"]
Granularity = Literal["tensor", "channel", "block"]

GRAPHS = ("denoiser", "text_encoder", "image_tower", "identity_fusion", "identity_schedule")
RECIPES_FOLDER = Path(__file__).parent / "recipes"
SCHEMA_VERSION = 1
NVFP4_BLOCK = 16  # of the format: one E4M3 scale for 16 values
_INT4_BLOCKS = (16, 32, 64, 128)
_LARGEST_FILE_BYTES = 1 << 20

# What each weight format can be divided into, and with which activations it is multiplied.
_GRANULARITIES: Mapping[str, tuple[str, ...]] = {
    "int8": ("channel", "tensor"),
    "fp8_e4m3": ("channel", "tensor"),
    "int4": ("block",),
    "nvfp4": ("block",),
}
_ACTIVATIONS: Mapping[str, tuple[str, ...]] = {
    "int8": ("none", "int8"),
    "fp8_e4m3": ("none", "fp8_e4m3"),
    "int4": ("none",),
    "nvfp4": ("none",),
}


@dataclass(frozen=True)
class Keep:
    """Layers that stay at the export's precision, and why."""

    layers: str
    reason: str


DEFAULT_KEEP: Mapping[str, tuple[Keep, ...]] = {
    "denoiser": (
        Keep("patch_embed.*", "every token passes through the embedding; its error reaches all blocks"),
        Keep("time_embedding.*", "one row a video; its error shifts every modulation"),
        Keep("ofs_embedding.*", "one row a video; its error shifts every modulation"),
        Keep("*.norm1.linear", "modulation: one row a video, and a factor on every token"),
        Keep("*.norm2.linear", "modulation: one row a video, and a factor on every token"),
        Keep("norm_out.linear", "modulation: one row a video, and a factor on every token"),
        Keep("proj_out", "its rounding is the velocity's own"),
        Keep("perceiver_cross_attention.*", "identity attention: few operations, and the likeness"),
        Keep("transformer_blocks.{first}.*", "first block: its error passes through all others"),
        Keep("transformer_blocks.{last}.*", "last block: nothing after it evens its error out"),
    ),
    "text_encoder": (),
    "image_tower": (Keep("network.head", "the pooled vector: one row a photo, and the likeness"),),
    "identity_fusion": (),
    "identity_schedule": (),
}


@dataclass(frozen=True)
class LayerRule:
    """How the layers that a pattern names are computed.

    block_size: values along the input that share a scale, with granularity "block". activation: static,
    symmetric, one scale for the tensor. activation_range: "max", or the share of values (0.5 to 1) that
    the range holds. smooth: SmoothQuant's alpha (arXiv 2211.10438). awq: scale search of AWQ
    (arXiv 2306.00978). timestep_groups: ranges of the activation by timestep.
    """

    layers: str
    weight: WeightFormat
    granularity: Granularity = "channel"
    block_size: int | None = None
    activation: ActivationFormat = "none"
    activation_range: Literal["max"] | float = "max"
    smooth: float | None = None
    awq: bool = False
    timestep_groups: bool = False

    @property
    def needs_statistics(self) -> bool:
        return self.activation != "none" or self.awq


@dataclass(frozen=True)
class AttentionRule:
    """The four operands of the attentions that a pattern names: in E4M3, or as exported ("none")."""

    layers: str
    format: Literal["fp8_e4m3", "none"]


@dataclass(frozen=True)
class GraphRecipe:
    rules: tuple[LayerRule, ...]
    keep: tuple[Keep, ...]
    attention: tuple[AttentionRule, ...] = ()

    @property
    def quantises_attention(self) -> bool:
        return any(rule.format != "none" for rule in self.attention)

    def kept(self, layer: str, layers: tuple[str, ...] = ()) -> Keep | None:
        """The entry that keeps `layer` high. layers: all of the graph, for `{first}` and `{last}`."""
        return next((keep for keep in self.keep if matches(keep.layers, layer, layers)), None)

    def rule(self, layer: str, layers: tuple[str, ...] = ()) -> LayerRule | None:
        """The first rule that names `layer`, whatever `keep` says."""
        return next((rule for rule in self.rules if matches(rule.layers, layer, layers)), None)

    def attention_rule(self, module: str, layers: tuple[str, ...] = ()) -> AttentionRule | None:
        """The first attention rule that names `module`, for instance transformer_blocks.1.attn1."""
        return next((rule for rule in self.attention if matches(rule.layers, module, layers)), None)


@dataclass(frozen=True)
class Recipe:
    name: str
    summary: str
    graphs: Mapping[str, GraphRecipe]

    @classmethod
    def load(cls, name_or_file: str | Path) -> Recipe:
        """A ready recipe by its name, or a JSON file. Raises InputError naming file, field, value, rule."""
        text = str(name_or_file)
        if text in ready_recipes():
            return cls.read(RECIPES_FOLDER / f"{text}.json")
        if Path(text).suffix == ".json" or Path(text).is_file():
            return cls.read(Path(text))
        raise InputError(
            f"no recipe {text!r}; ready ones are {', '.join(ready_recipes())}, or pass a JSON file"
        )

    @classmethod
    def read(cls, file: Path) -> Recipe:
        """Raises InputError that names the file, the field, its value and the rule it breaks."""
        try:
            if file.stat().st_size > _LARGEST_FILE_BYTES:
                raise InputError(f"recipe {file} is larger than {_LARGEST_FILE_BYTES} bytes; it is no recipe")
            document = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"recipe {file} is not readable JSON ({error})") from error
        return cls.from_json(document, source=str(file))

    @classmethod
    def from_json(cls, document: Any, *, source: str = "recipe") -> Recipe:
        """Raises InputError as `read` does; `source` is what the message calls the file."""
        fields = Fields(source, "", document)
        fields.only("schema_version", "name", "summary", "graphs")
        if (version := fields.get("schema_version")) != SCHEMA_VERSION:
            raise fields.wrong("schema_version", version, f"this release reads {SCHEMA_VERSION}")
        graphs = Fields(source, "graphs", fields.get("graphs"))
        if not graphs.document:
            raise fields.wrong("graphs", {}, f"name one of {', '.join(GRAPHS)}")
        graphs.only(*GRAPHS)
        return cls(
            name=fields.text("name"),
            summary=fields.text("summary", ""),
            graphs={
                name: _read_graph(Fields(source, f"graphs.{name}", graphs.get(name)), name)
                for name in graphs.document
            },
        )

    def to_json(self) -> dict[str, Any]:
        """A document that `from_json` reads back to an equal recipe; defaults are written out."""
        graphs = {name: asdict(graph) for name, graph in sorted(self.graphs.items())}
        document: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "name": self.name,
            "summary": self.summary,
            "graphs": json.loads(json.dumps(graphs)),  # tuples become lists
        }
        return document

    @property
    def hash(self) -> str:
        """sha256 of what decides the result: the rules, without name and summary."""
        text = json.dumps(self.to_json()["graphs"], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def needs_statistics(self) -> bool:
        """Whether a rule reads statistics of activations (static activations, AWQ, attention)."""
        return any(
            graph.quantises_attention or any(rule.needs_statistics for rule in graph.rules)
            for graph in self.graphs.values()
        )

    @property
    def weight_formats(self) -> tuple[str, ...]:
        """Weight formats in use, sorted."""
        rules = [rule for graph in self.graphs.values() for rule in graph.rules]
        return tuple(sorted({rule.weight for rule in rules} - {"none"}))

    @property
    def quantises_attention(self) -> bool:
        return any(graph.quantises_attention for graph in self.graphs.values())


def ready_recipes() -> tuple[str, ...]:
    """Names of the recipes that ship with the package."""
    return tuple(sorted(file.stem for file in RECIPES_FOLDER.glob("*.json")))


def matches(pattern: str, name: str, names: tuple[str, ...] = ()) -> bool:
    """Whether a glob names a layer. `{first}` and `{last}` are looked up among `names`."""
    for word, choose in (("{first}", min), ("{last}", max)):
        if word in pattern:
            prefix = pattern.split(word, maxsplit=1)[0]
            starts = [other.removeprefix(prefix).split(".")[0] for other in names if other.startswith(prefix)]
            numbers = [int(start) for start in starts if start.isdigit()]
            if not numbers:
                return False
            pattern = pattern.replace(word, str(choose(numbers)))
    return fnmatchcase(name, pattern)


def _read_graph(fields: Fields, graph: str) -> GraphRecipe:
    fields.only("rules", "keep", "attention")
    attention = fields.items("attention", _read_attention)
    if attention and graph != "denoiser":
        raise fields.wrong("attention", "given", "only the denoiser's attention can be quantised")
    rules = fields.items("rules", _read_rule)
    if not rules and not attention:
        raise fields.wrong("rules", [], "a graph needs a rule; leave the graph out to keep it as it is")
    if graph != "denoiser" and any(rule.timestep_groups for rule in rules):
        raise fields.wrong("rules", "timestep_groups", "only the denoiser sees a timestep")
    keep = fields.items("keep", _read_keep) if "keep" in fields.document else DEFAULT_KEEP[graph]
    return GraphRecipe(rules, keep, attention)


def _read_keep(fields: Fields) -> Keep:
    fields.only("layers", "reason")
    return Keep(fields.text("layers"), fields.text("reason"))


def _read_attention(fields: Fields) -> AttentionRule:
    fields.only("layers", "format")
    return AttentionRule(fields.text("layers"), fields.choice("format", ("fp8_e4m3", "none")))


def _read_rule(fields: Fields) -> LayerRule:
    fields.only(*LayerRule.__dataclass_fields__)
    layers = fields.text("layers")
    weight = fields.choice("weight", get_args(WeightFormat))
    if weight == "none":
        for field in fields.document:
            if field not in ("layers", "weight") and fields.document[field] not in (None, False, "none"):
                raise fields.wrong(field, fields.document[field], "a rule with weight 'none' has no more")
        return LayerRule(layers, "none")
    granularity = fields.choice("granularity", _GRANULARITIES[weight], _GRANULARITIES[weight][0])
    activation = fields.choice("activation", _ACTIVATIONS[weight], "none")
    rule = LayerRule(
        layers,
        weight,
        granularity,
        _block_size(fields, weight),
        activation,
        _range(fields),
        _alpha(fields),
        fields.flag("awq"),
        fields.flag("timestep_groups"),
    )
    if activation == "none":
        for field, value in (
            ("smooth", rule.smooth is not None),
            ("timestep_groups", rule.timestep_groups),
            ("activation_range", rule.activation_range != "max"),
        ):
            if value:
                raise fields.wrong(field, fields.document[field], "it needs an activation that is not 'none'")
    elif rule.awq:
        raise fields.wrong("awq", True, "AWQ is for weights alone; set activation to 'none', or use smooth")
    if rule.smooth is not None and rule.activation_range != "max":
        raise fields.wrong(
            "activation_range",
            rule.activation_range,
            "the share is one of all channels as they are; with smooth it must be 'max'",
        )
    return rule


def _block_size(fields: Fields, weight: str) -> int | None:
    value = fields.document.get("block_size", NVFP4_BLOCK if weight == "nvfp4" else None)
    sizes = {"int4": _INT4_BLOCKS, "nvfp4": (NVFP4_BLOCK,)}.get(weight)
    if sizes is None:
        if value is not None:
            raise fields.wrong("block_size", value, f"{weight} has a scale for a tensor or a channel")
        return None
    if type(value) is not int or value not in sizes:
        raise fields.wrong("block_size", value, f"{weight} takes {', '.join(map(str, sizes))}")
    return value


def _range(fields: Fields) -> Literal["max"] | float:
    value = fields.document.get("activation_range", "max")
    if value == "max":
        return "max"
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.5 <= value <= 1:
        raise fields.wrong("activation_range", value, "it must be 'max' or a share from 0.5 to 1")
    return float(value)


def _alpha(fields: Fields) -> float | None:
    value = fields.document.get("smooth")
    if value is None:
        return None
    valid = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not valid or not 0 <= value <= 1:
        raise fields.wrong("smooth", value, "SmoothQuant's alpha is from 0 to 1")
    return float(value)
