"""Recipes: what ships, what a file may say, and which targets refuse what."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from proteus_deploy.errors import InputError
from proteus_deploy.export.quantize import plan_graph, require_statistics
from proteus_deploy.export.recipe import DEFAULT_KEEP, Recipe, matches, ready_recipes
from proteus_deploy.export.recipe_targets import check_target, unsupported

RULE = {"layers": "transformer_blocks.*", "weight": "int8"}
PARTS = ("norm1.linear", "norm2.linear", "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0")
BLOCKS = (0, 1, 2, 10)
NAMES = (
    "patch_embed.text_proj",
    "time_embedding.linear_1",
    *(f"transformer_blocks.{block}.{part}" for block in BLOCKS for part in PARTS),
    "perceiver_cross_attention.0.to_q",
    "norm_out.linear",
    "proj_out",
)
SHAPES = dict.fromkeys(NAMES, (96, 96))
ATTENTION = tuple(f"transformer_blocks.{block}.attn1" for block in (0, 1, 2, 10))


def document(*rules: dict[str, Any], graph: str = "denoiser", **fields: Any) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "name": "mine",
        "graphs": {graph: {"rules": list(rules or (RULE,)), **fields}},
    }


def read(*rules: dict[str, Any], **fields: Any) -> Recipe:
    return Recipe.from_json(document(*rules, **fields), source="mine.json")


@pytest.mark.parametrize("name", ready_recipes())
def test_ready_recipes_are_read_and_written_back(name: str) -> None:
    recipe = Recipe.load(name)
    assert recipe.name == name
    assert recipe.summary
    again = Recipe.from_json(json.loads(json.dumps(recipe.to_json())))
    assert again == recipe
    assert again.hash == recipe.hash


def test_seven_recipes_ship() -> None:
    assert ready_recipes() == (
        "fp8", "fp8-attention", "fp8-tensor", "int4-weight", "int8", "int8-weight", "nvfp4-weight",
    )  # fmt: skip
    assert len({Recipe.load(name).hash for name in ready_recipes()}) == 7


def test_hash_is_of_the_rules_alone() -> None:
    one = read()
    renamed = Recipe.from_json({**document(), "name": "other", "summary": "words"})
    assert renamed.hash == one.hash
    assert read({**RULE, "granularity": "tensor"}).hash != one.hash


def test_recipe_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(document()))
    assert Recipe.load(file) == read()
    assert Recipe.load(str(file)).name == "mine"


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            {**RULE, "weight": "int3"},
            r"'graphs\.denoiser\.rules\[0\]\.weight' is 'int3'; choose from none, in",
        ),
        ({"weight": "int8"}, r"'graphs\.denoiser\.rules\[0\]\.layers' is missing"),
        (
            {**RULE, "colour": 1},
            r"'graphs\.denoiser\.rules\[0\]\.colour' is unknown; known are layers, weight",
        ),
        ({**RULE, "granularity": "block"}, r"granularity' is 'block'; choose from channel, tensor"),
        ({**RULE, "block_size": 32}, "int8 has a scale for a tensor or a channel"),
        ({**RULE, "weight": "int4"}, r"block_size' is None; int4 takes 16, 32, 64, 128"),
        ({**RULE, "weight": "int4", "block_size": 48}, "block_size' is 48; int4 takes"),
        ({**RULE, "weight": "nvfp4", "block_size": 32}, "nvfp4 takes 16"),
        ({**RULE, "activation": "fp8_e4m3"}, r"activation' is 'fp8_e4m3'; choose from none, int8"),
        ({**RULE, "smooth": 0.5}, r"smooth' is 0\.5; it needs an activation"),
        ({**RULE, "timestep_groups": True}, "it needs an activation"),
        ({**RULE, "activation_range": 0.999}, "it needs an activation"),
        (
            {**RULE, "activation": "int8", "smooth": 1.5},
            r"smooth' is 1\.5; SmoothQuant's alpha is from 0 to 1",
        ),
        ({**RULE, "activation": "int8", "smooth": True}, "smooth' is True"),
        ({**RULE, "activation": "int8", "activation_range": 0.2}, "must be 'max' or a share from 0.5 to 1"),
        ({**RULE, "activation": "int8", "activation_range": 0.99, "smooth": 0.5}, "with smooth it must be"),
        ({**RULE, "activation": "int8", "awq": True}, "AWQ is for weights alone"),
        ({**RULE, "awq": "yes"}, r"awq' is 'yes'; it must be true or false"),
        ({"layers": "*", "weight": "none", "smooth": 0.5}, "a rule with weight 'none' has no more"),
        ("rule", "must be an object"),
    ],
)
def test_a_wrong_rule_is_named(rule: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read(rule)
    assert str(caught.value).startswith("mine.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 2}, "'schema_version' is 2; this release reads 1"),
        ({"name": ""}, "'name' is ''"),
        ({"more": 1}, "'more' is unknown"),
        ({"graphs": {}}, "name one of denoiser"),
        ({"graphs": {"vae_decoder_next": {"rules": [RULE]}}}, r"'graphs\.vae_decoder_next' is unknown"),
        ({"graphs": {"denoiser": {"rules": []}}}, "a graph needs a rule"),
        ({"graphs": {"denoiser": {"rules": {}}}}, "it must be a list"),
        ({"graphs": []}, "must be an object"),
        (
            {
                "graphs": {
                    "text_encoder": {"rules": [RULE], "attention": [{"layers": "*", "format": "fp8_e4m3"}]}
                }
            },
            "only the denoiser's attention",
        ),
        (
            {"graphs": {"image_tower": {"rules": [{**RULE, "activation": "int8", "timestep_groups": True}]}}},
            "only the denoiser sees a timestep",
        ),
    ],
)
def test_a_wrong_document_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Recipe.from_json({**document(), **changes}, source="mine.json")


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    with pytest.raises(InputError, match=r"broken\.json is not readable JSON"):
        Recipe.load(broken)
    large = tmp_path / "large.json"
    large.write_text(" " * (1 << 21))
    with pytest.raises(InputError, match="larger than"):
        Recipe.load(large)
    with pytest.raises(InputError, match=r"absent\.json is not readable"):
        Recipe.load(tmp_path / "absent.json")
    with pytest.raises(InputError, match=r"no recipe 'int9'; ready ones are fp8, .*int8"):
        Recipe.load("int9")


def test_patterns() -> None:
    names = tuple(SHAPES)
    assert matches("transformer_blocks.*.attn1.to_q", "transformer_blocks.1.attn1.to_q")
    assert matches("transformer_blocks.{first}.*", "transformer_blocks.0.attn1.to_q", names)
    assert matches("transformer_blocks.{last}.*", "transformer_blocks.10.attn1.to_q", names), "10 is above 2"
    assert not matches("transformer_blocks.{last}.*", "transformer_blocks.2.attn1.to_q", names)
    assert not matches("absent.{last}.*", "transformer_blocks.2.attn1.to_q", names)


def test_first_rule_wins_and_what_stays_high_says_why() -> None:
    recipe = read(
        {"layers": "*.to_out.0", "weight": "none"},
        {"layers": "*.to_v", "weight": "int4", "granularity": "block", "block_size": 32},
        RULE,
    )
    plan = {layer.name: layer for layer in plan_graph(recipe, "denoiser", SHAPES).layers}
    assert plan["transformer_blocks.1.attn1.to_q"].precision == "int8"
    assert plan["transformer_blocks.1.attn1.to_v"].precision == "int4 in blocks of 32"
    assert plan["transformer_blocks.1.attn1.to_out.0"].reason == "the recipe says so"
    assert plan["transformer_blocks.0.attn1.to_q"].reason.startswith("first block")
    assert plan["transformer_blocks.10.attn1.to_q"].reason.startswith("last block")
    assert plan["transformer_blocks.1.norm1.linear"].reason.startswith("modulation")
    assert plan["proj_out"].rule is None
    assert plan["transformer_blocks.1.attn1.to_k"].leader == "transformer_blocks.1.attn1.to_q"
    assert plan["transformer_blocks.1.attn1.to_v"].leader == "transformer_blocks.1.attn1.to_v"


def test_an_empty_keep_keeps_nothing() -> None:
    recipe = read({**RULE, "layers": "transformer_blocks.*"}, keep=[])
    assert len(plan_graph(recipe, "denoiser", SHAPES).quantised) == 24
    assert read().graphs["denoiser"].keep == DEFAULT_KEEP["denoiser"]


def test_attention_of_the_ends_stays_high() -> None:
    recipe = Recipe.load("fp8-attention")
    plan = plan_graph(recipe, "denoiser", SHAPES, ATTENTION)
    assert [entry.format for entry in plan.attention] == [None, "fp8_e4m3", "fp8_e4m3", None]
    assert plan.formats == ("fp8_e4m3", "int8")
    assert plan.to_json()["attention"]["transformer_blocks.0.attn1"]["precision"] == "as exported"


def test_rules_that_cannot_be_followed() -> None:
    with pytest.raises(
        InputError, match=r"the rule 'blocks\.\*' names no layer of denoiser; .* like 'transf"
    ):
        plan_graph(read({**RULE, "layers": "blocks.*"}), "denoiser", SHAPES)
    with pytest.raises(InputError, match="attention rule 'nowhere' names none"):
        plan_graph(
            read(RULE, attention=[{"layers": "nowhere", "format": "fp8_e4m3"}]), "denoiser", SHAPES, ATTENTION
        )
    four = {**RULE, "weight": "int4", "granularity": "block", "block_size": 64}
    with pytest.raises(InputError, match="to_q has 96 inputs, which blocks of 64 do not divide"):
        plan_graph(read(four), "denoiser", SHAPES)
    everything = {**RULE, "layers": "*"}
    with pytest.raises(InputError, match=r"0\.to_q is folded with the face tokens .* before this one"):
        plan_graph(read({**everything, "activation": "int8"}, keep=[]), "denoiser", SHAPES)
    folded = plan_graph(read(everything, keep=[]), "denoiser", SHAPES).layers[-3]
    assert (folded.name, folded.precision) == ("perceiver_cross_attention.0.to_q", "int8")


def test_statistics_are_asked_for() -> None:
    require_statistics(Recipe.load("int8-weight"), None)
    for name in ("int8", "int4-weight", "fp8-attention"):
        with pytest.raises(InputError, match=f"'{name}' needs statistics .* proteus-deploy calibrate"):
            require_statistics(Recipe.load(name), None)


@pytest.mark.parametrize(
    ("recipe", "target", "reason"),
    [
        ("fp8", "sm86", r"fp8_e4m3 needs sm89 or newer"),
        ("fp8-attention", "sm75", "fp8_e4m3 needs sm89"),
        ("nvfp4-weight", "sm89", "nvfp4 needs sm100"),
        ("nvfp4-weight", "onnxruntime", "no kernel of DequantizeLinear for E2M1"),
        ("int4-weight", "sm75", "int4 needs sm80"),
    ],
)
def test_what_a_target_cannot_run(recipe: str, target: str, reason: str) -> None:
    with pytest.raises(InputError, match=f"'{recipe}' with fp32 can't run on {target}: .*{reason}"):
        check_target(Recipe.load(recipe), target)


def test_what_a_target_runs() -> None:
    runs = {
        "fp8": ("sm89", "sm120", "onnxruntime"),
        "nvfp4-weight": ("sm100", "sm120", "openvino"),
        "int8": ("sm75", "onnxruntime", "openvino"),
        "int4-weight": ("sm80", "onnxruntime"),
    }
    for recipe, target in ((recipe, target) for recipe, targets in runs.items() for target in targets):
        assert not unsupported(Recipe.load(recipe), target), (recipe, target)
    assert unsupported(Recipe.load("int8"), "onnxruntime", "bf16")
    assert unsupported(Recipe.load("int8"), "sm75", "bf16")
    with pytest.raises(InputError, match="'gpu' is no target; name one like sm89"):
        check_target(Recipe.load("int8"), "gpu")
