"""Recipe and layers -> what is done to each layer, and why; for the ONNX and the torch path alike.

Only names and shapes are needed. The numbers that a plan's layers are quantised with are found by
`input_scaling.py` (activations) and `weight_quantizers.py` (weights).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from proteus_deploy.errors import InputError
from proteus_deploy.export.recipe import LayerRule, Recipe, matches

if TYPE_CHECKING:
    from proteus_deploy.export.activation_statistics import ActivationStatistics

# Last parts of the names of layers that read the same input.
_SHARED = (
    ("to_q", "to_k", "to_v"),
    ("q", "k", "v"),
    ("q_proj", "k_proj", "v_proj"),
    ("wi_0", "wi_1"),
    ("w1", "w2"),
)
_NOT_NAMED = "no rule of the recipe names it"
OPERANDS = ("query", "key", "value")


def is_folded(layer: str) -> bool:
    """Whether its weight meets the face tokens' keys or values, and no activations of the video alone."""
    return layer.startswith("perceiver_cross_attention.") and layer.endswith((".to_q", ".to_out"))


def coarsest(formats: Collection[str]) -> str:
    """The one of a graph's formats that decides its error, "" for none."""
    return next((kind for kind in ("nvfp4", "int4", "fp8_e4m3", "int8") if kind in formats), "")


@dataclass(frozen=True)
class LayerPlan:
    """rule: None where the layer stays high. leader: first of the layers that share its scaled input.

    outputs, inputs: sizes of the layer.
    """

    name: str
    rule: LayerRule | None
    reason: str
    leader: str
    outputs: int
    inputs: int

    @property
    def precision(self) -> str:
        """For instance "int8 x int8" (activations last), "int4 in blocks of 32", "as exported"."""
        if self.rule is None:
            return "as exported"
        size = f" in blocks of {self.rule.block_size}" if self.rule.block_size else ""
        times = f" x {self.rule.activation}" if self.rule.activation != "none" else ""
        return f"{self.rule.weight}{size}{times}"


@dataclass(frozen=True)
class AttentionPlan:
    """One joint attention, named as its module. format: "fp8_e4m3", or None where it stays high."""

    name: str
    format: str | None
    reason: str


@dataclass(frozen=True)
class GraphPlan:
    graph: str
    layers: tuple[LayerPlan, ...]
    attention: tuple[AttentionPlan, ...] = ()

    @property
    def quantised(self) -> tuple[LayerPlan, ...]:
        return tuple(layer for layer in self.layers if layer.rule is not None)

    @property
    def formats(self) -> tuple[str, ...]:
        """Of weights, activations and attention, sorted."""
        rules = [layer.rule for layer in self.layers if layer.rule is not None]
        found = {rule.weight for rule in rules} | {rule.activation for rule in rules}
        return tuple(sorted((found | {plan.format for plan in self.attention if plan.format}) - {"none"}))

    def groups(self) -> dict[str, list[LayerPlan]]:
        """Quantised layers by the leader of their input, in the order of the graph."""
        found: dict[str, list[LayerPlan]] = {}
        for layer in self.quantised:
            found.setdefault(layer.leader, []).append(layer)
        return found

    def to_json(self) -> dict[str, Any]:
        """For the manifest: precision and reason of every layer."""
        document: dict[str, Any] = {
            "formats": list(self.formats),
            "layers": {
                layer.name: {"precision": layer.precision, "reason": layer.reason} for layer in self.layers
            },
        }
        if self.attention:
            document["attention"] = {
                plan.name: {"precision": plan.format or "as exported", "reason": plan.reason}
                for plan in self.attention
            }
        return document


def linear_shapes(module: nn.Module) -> dict[str, tuple[int, int]]:
    """{name: (outputs, inputs)} of every Linear, in the module's order. Weights may be on any device."""
    return {
        name: (child.out_features, child.in_features)
        for name, child in module.named_modules()
        if isinstance(child, nn.Linear)
    }


def attention_modules(module: nn.Module) -> tuple[str, ...]:
    """Names of the joint attentions of a denoiser, in its order."""
    from proteus_deploy.model.transformer import JointAttention

    return tuple(name for name, child in module.named_modules() if isinstance(child, JointAttention))


def plan_module(recipe: Recipe, graph: str, module: nn.Module) -> GraphPlan:
    """`plan_graph` for a network."""
    return plan_graph(recipe, graph, linear_shapes(module), attention_modules(module))


def plan_graph(
    recipe: Recipe, graph: str, shapes: Mapping[str, tuple[int, int]], attention: Sequence[str] = ()
) -> GraphPlan:
    """What the recipe does to each layer (and attention) of one of its graphs, in the order of `shapes`.

    Raises InputError for a rule that names nothing, a block that doesn't divide a layer's inputs, and
    8-bit activations of layers whose weights are folded before the video meets them.
    """
    rules = recipe.graphs[graph]
    names = tuple(shapes)
    chosen: dict[str, tuple[LayerRule | None, str]] = {}
    for name, (_, inputs) in shapes.items():
        kept, rule = rules.kept(name, names), rules.rule(name, names)
        if kept is not None or rule is None or rule.weight == "none":
            why = kept.reason if kept is not None else "the recipe says so" if rule else _NOT_NAMED
            chosen[name] = None, why
            continue
        _check_layer(recipe, graph, name, inputs, rule)
        chosen[name] = rule, f"rule {rule.layers}"
    for rule in rules.rules:
        if not any(matches(rule.layers, name, names) for name in names):
            raise InputError(
                f"recipe {recipe.name!r}: the rule {rule.layers!r} names no layer of {graph}; layers are "
                f"named like {names[len(names) // 2]!r}"
            )
    for entry in rules.attention:
        if not any(matches(entry.layers, name, names) for name in attention):
            raise InputError(
                f"recipe {recipe.name!r}: the attention rule {entry.layers!r} names none of the attentions "
                f"of {graph}: {', '.join(attention[:3])}, …"
            )
    layers = [
        LayerPlan(name, rule, reason, _leader(name, rule, chosen), *shapes[name])
        for name, (rule, reason) in chosen.items()
    ]
    plans = []
    for name in attention if rules.attention else ():
        kept, found = rules.kept(f"{name}.attention", names), rules.attention_rule(name, names)
        high = kept is not None or found is None or found.format == "none"
        kind = None if high or found is None else found.format
        why = kept.reason if kept is not None else f"rule {found.layers}" if found else _NOT_NAMED
        plans.append(AttentionPlan(name, kind, why))
    return GraphPlan(graph, tuple(layers), tuple(plans))


def _check_layer(recipe: Recipe, graph: str, name: str, inputs: int, rule: LayerRule) -> None:
    if is_folded(name) and rule.needs_statistics:
        raise InputError(
            f"recipe {recipe.name!r}: {graph}/{name} is folded with the face tokens before it meets the "
            "video's, so no activations of its own can be quantised or measured; keep it, or put a rule "
            'without "activation" and "awq" before this one'
        )
    if rule.block_size is not None and inputs % rule.block_size:
        raise InputError(
            f"recipe {recipe.name!r}: {graph}/{name} has {inputs} inputs, which blocks of {rule.block_size} "
            "do not divide; put a rule with another block size or format before this one"
        )


def _leader(name: str, rule: LayerRule | None, chosen: Mapping[str, tuple[LayerRule | None, str]]) -> str:
    """The first layer that reads the same input and has the same rule."""
    stem, _, last = name.rpartition(".")
    for family in _SHARED:
        if last in family:
            siblings = [f"{stem}.{word}" for word in family]
            return next(sibling for sibling in siblings if chosen.get(sibling, (None, ""))[0] is rule)
    return name


def require_statistics(recipe: Recipe, statistics: ActivationStatistics | None) -> None:
    """Raises InputError when the recipe reads statistics and there are none."""
    if recipe.needs_statistics and statistics is None:
        raise InputError(
            f"recipe {recipe.name!r} needs statistics of activations; record them with: proteus-deploy "
            "calibrate CHECKPOINT --output-dir DIR, and pass --calibration DIR"
        )
