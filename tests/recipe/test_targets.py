"""The recipe's targets: their options, and that these are exactly the builders' options."""

from pathlib import Path

import pytest
from pdtrim_builders import TARGETS, get_target

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.recipe import Recipe
from pdtrim_deploy.recipe.targets import TARGETS as NAMES
from pdtrim_deploy.recipe.targets import TargetsSection

RECIPES = Path(__file__).parents[2] / "recipes"
BASE = "name: a\nmodel: {source: 'pypi:x'}\ntargets: "
# Said by the pipeline (stage, prompts), or of no use to a reader of recipes.
NOT_IN_RECIPES = {"stage", "prompts", "external_above"}


def load(tmp_path: Path, text: str) -> Recipe:
    (tmp_path / "r.yaml").write_text(BASE + text)
    return Recipe.load(tmp_path / "r.yaml")


@pytest.mark.parametrize("name", NAMES)
def test_options_and_defaults_are_those_of_the_builder(name: str) -> None:
    """A recipe sends its own defaults for missing options, so they must equal the builder's."""
    section = TargetsSection.model_validate({name: None}).requested[name]
    builder = get_target(name).options
    assert set(type(section).model_fields) == set(builder.model_fields) - NOT_IN_RECIPES
    assert builder().model_dump(mode="json", exclude=NOT_IN_RECIPES) == section.model_dump(mode="json")
    assert builder.model_validate(section.model_dump(mode="json", exclude_none=True)) == builder()


def test_the_names_are_those_of_the_builders() -> None:
    assert set(NAMES) == set(TARGETS)


def test_compute_capabilities_are_those_of_the_builder() -> None:
    from typing import get_args

    from pdtrim_builders.targets.tensorrt import RTX_FLAVOUR

    from pdtrim_deploy.recipe.targets import ComputeCapability

    assert get_args(get_args(ComputeCapability)[0]) == RTX_FLAVOUR.capabilities


@pytest.mark.parametrize(("text", "says"), [
    ("{openvino: {}}", "targets.openvino is not a known key; allowed here: onnx, tensorrt-rtx, tensorrt, tensorrt-llm"),
    ("[onnx]", "targets is ['onnx']; allowed: a mapping with onnx, tensorrt-rtx, tensorrt, tensorrt-llm"),
    ("{onnx: yes}", "targets.onnx is True; allowed: a mapping with dtype, weights, tolerance"),
    ("{onnx: {wights: int8}}", "targets.onnx.wights is not a known key; allowed here: dtype, weights, tolerance"),
    ("{onnx: {weights: int3}}", "targets.onnx.weights is 'int3'; allowed: native, int8"),
    ("{onnx: {dtype: int3}}", "targets.onnx.dtype is 'int3'; allowed: float32, float16"),
    ("{onnx: {tolerance: 0}}", "targets.onnx.tolerance is 0; allowed: a number above 0"),
    ("{tensorrt-rtx: {compute_capabilities: ['9.0']}}", "compute_capabilities.0 is '9.0'; allowed: 7.5, 8.0, 8.6"),
    ("{tensorrt-rtx: {compute_capabilities: []}}", "is []; allowed: a list of one or more of 7.5, 8.0"),
    ("{tensorrt: {usual_tokens: 5000}}", "usual_tokens is 5000; allowed: at most most_tokens, which is 4096"),
    ("{tensorrt: {dry_run: 3}}", "targets.tensorrt.dry_run is 3; allowed: true or false"),
    ("{tensorrt-llm: {tensor_parallel: [3]}}", "targets.tensorrt-llm.tensor_parallel.0 is 3; allowed: 1, 2, 4, 8"),
    ("{tensorrt-llm: {port: 70000}}", "targets.tensorrt-llm.port is 70000; allowed: an integer from 1 to 65535"),
    ("{tensorrt-llm: {versions: [1.4]}}", "targets.tensorrt-llm.versions.0 is '1.4'; allowed: 1.2, 1.3"),
    ("{tensorrt-llm: {quantisation: int4}}", "targets.tensorrt-llm.quantisation is 'int4'; allowed: none, fp8, int8"),
])  # fmt: skip
def test_an_error_names_the_target_and_what_is_allowed(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        load(tmp_path, text)
    assert f"r.yaml: targets{'' if says.startswith('targets') else '.'}" in str(caught.value)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_name_alone_asks_with_every_default_and_numbers_are_capabilities(tmp_path: Path) -> None:
    recipe = load(tmp_path, "{onnx: , tensorrt-rtx: {compute_capabilities: [8.9, 12.0]}}")
    assert list(recipe.targets.requested) == ["onnx", "tensorrt-rtx"]
    assert recipe.targets.tensorrt_rtx is not None
    assert recipe.targets.tensorrt_rtx.compute_capabilities == ("8.9", "12.0")
    (tmp_path / "resolved.yaml").write_text(recipe.to_yaml())
    assert Recipe.load(tmp_path / "resolved.yaml") == recipe
    assert load(tmp_path, "{onnx: }").digest != load(tmp_path, "{onnx: {weights: int8}}").digest


@pytest.mark.parametrize("unit", sorted((RECIPES / "units" / "targets").glob("*.yaml")), ids=lambda path: path.stem)
def test_each_unit_is_valid(tmp_path: Path, unit: Path) -> None:
    text = f"include: [{unit}]\nname: a\nmodel: {{source: 'pypi:x'}}\n"
    (tmp_path / "r.yaml").write_text(text)
    targets = Recipe.load(tmp_path / "r.yaml").targets.requested
    assert unit.stem.removesuffix("-int8") in targets or unit.stem == "all"


def test_the_units_ask_for_every_target() -> None:
    recipe = Recipe.load(RECIPES / "smollm2-targets.yaml")
    assert tuple(recipe.targets.requested) == NAMES
    assert list(Recipe.load(RECIPES / "smollm2-quick.yaml").targets.requested) == ["onnx"]
