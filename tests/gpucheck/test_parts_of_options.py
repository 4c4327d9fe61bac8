"""Parts of options, formats and builds: what would be served, how, and what a build on a device is compared with."""

from contextlib import contextmanager

import pytest
from pretended_devices import PretendedDevices

from pdtrim_deploy.gpucheck import builds, bundles, options, pair, plans, stock, timed, tiny, tiny_fp8
from pdtrim_deploy.gpucheck.checks import rows_of
from pdtrim_deploy.models.quantized import stored_weights
from pdtrim_deploy.serving import spec


@pytest.fixture
def judged(monkeypatch):
    """Bundles, pairs, and the load between two judgements; none is started."""
    served = []
    monkeypatch.setattr(
        pair, "judged", lambda bundle, variant, _, between: served.append((bundle, variant, between)) or {}
    )
    return served


def test_workers_have_the_sizes_of_serve_pages_of_16_and_sends_by_layer(tmp_path, judged, monkeypatch):
    monkeypatch.setattr(spec, "gpu_count", lambda: 2)
    assert {row.status for row in rows_of(options.worker_checks(tmp_path, tmp_path))} == {"run"}
    (bundle, usual, _), (_, pages, _), (_, by_layer, _) = judged
    assert {send.mode for send in bundle.plan.kv} == {"sparse"}
    workers = {name: variant.of(bundle).spec.workers[0].options for name, variant in
               (("usual", usual), ("pages", pages), ("by_layer", by_layer))}  # fmt: skip
    assert (workers["usual"].pool_tokens, workers["usual"].requests, workers["usual"].page_tokens) == (None, None, 64)
    assert (workers["pages"].pool_tokens, workers["pages"].page_tokens) == (8192, 16)
    assert workers["by_layer"].send_by_layer


def test_caches_are_judged_before_and_after_an_eviction(tmp_path, judged, monkeypatch):
    monkeypatch.setattr(bundles, "tiny_bundle", lambda folder, kv, *_, **__: kv["method"])
    rows = list(rows_of(options.cache_checks(tmp_path, tmp_path)))
    assert [row.part for row in rows] == [
        "hierarchical cache on prefill", "radix cache on decode", "radix cache on decode, some layers cut",
        "hierarchical cache on decode",
    ]  # fmt: skip
    variants = [(bundle, variant.prefill_args, variant.decode_args) for bundle, variant, _ in judged]
    both = (*options.RADIX, *options.HIERARCHICAL)
    assert variants == [
        ("none", options.HIERARCHICAL, ()), ("none", (), options.RADIX), ("attention-mass", (), options.RADIX),
        ("none", (), both),
    ]  # fmt: skip
    (between,) = {id(between): between for _, _, between in judged}.values()
    assert between.requests * between.input.tokens > spec.SMALL_POOL_TOKENS


def test_some_layers_of_a_plan_are_cut(tmp_path):
    assert {send.mode for send in bundles.tiny_bundle(tmp_path, options.SOME_CUT).plan.kv} == {"full", "sparse"}


def test_the_second_judgement_counts(tmp_path, monkeypatch):
    calls = []

    @contextmanager
    def up(*_):
        yield None

    monkeypatch.setattr(pair.Pair, "of", up)
    monkeypatch.setattr(pair, "measured", lambda _, loads: calls.append(("load", *loads.values())) or {})
    monkeypatch.setattr(pair, "_faithful", lambda *_: calls.append("judged") or RESULT)
    pair.judged(None, pair.Pair(tmp_path), {}, "evicting")
    assert calls[:3] == ["judged", ("load", "evicting"), "judged"]


class RESULT:
    max_logprob_error, tolerance, controls_detected, controls = 0.0, 1.0, {}, ()


def test_fp8_weights_are_in_both_stages(tmp_path, judged):
    rows = list(rows_of(plans.fp8_weight_checks(tmp_path, tmp_path)))
    assert [(row.part, row.status, row.reason) for row in rows] == [
        (f"FP8 weights: {kind}", "run", "") for kind in tiny_fp8.FP8
    ]
    for (bundle, _, _), kind in zip(judged, tiny_fp8.FP8, strict=True):
        for stage in (bundle.prefill_dir, bundle.decode_dir):
            assert stored_weights(stage).startswith(f"FP8 in {kind.partition(',')[0]} format")


def test_each_stage_of_a_mixture_has_fewer_experts(tmp_path, judged):
    (check,) = [check for check in plans.plan_checks(tmp_path, tmp_path) if check.name.startswith("experts")]
    assert [(row.status, row.reason) for row in rows_of([check])] == [("run", "")]
    plan = judged[0][0].plan
    assert [{len(kept) for kept in plan.kept_experts(stage).values()} for stage in ("prefill", "decode")] == [{3}, {2}]


def test_the_same_model_is_timed_under_each_plan_and_without_the_plugin(tmp_path, monkeypatch):
    monkeypatch.setattr(timed, "WIDE", tiny.Size())
    served = []
    monkeypatch.setattr(timed, "_itl", lambda variant, bundle, loads: served.append(bundle()) or {})
    monkeypatch.setattr(timed, "_stock_itl", timed._itl)
    assert [row.part for row in rows_of(timed.itl_checks(tmp_path, tmp_path))] == [
        "ITL: cut plan", "ITL: dense plan", "ITL: SGLang alone, dense",
    ]  # fmt: skip
    cut, dense, alone = (bundle.plan for bundle in served)
    assert {len(plan.decode_layers) for plan in (cut, dense)} == {tiny.Size().num_hidden_layers}
    assert ({send.mode for send in cut.kv}, {send.mode for send in dense.kv}) == ({"sparse"}, {"full"})
    assert dense == alone


def test_sglang_alone_has_a_workers_options_without_its_half():
    worker = ["python", "-m", "sglang.launch_server", "--page-size", "64", "--disaggregation-mode", "prefill",
              "--disaggregation-bootstrap-port", "1", "--enable-metrics"]  # fmt: skip
    assert stock.stock_command(worker) == [*worker[:5], "--enable-metrics"]


def test_a_build_on_a_pretended_gpu_is_the_cpus():
    with PretendedDevices():
        (row,) = rows_of(builds.build_checks())
    assert (row.status, row.reason) == ("run", "")
    assert row.figure["worst_weight_error"] == 0.0


def test_a_device_that_fits_something_else_is_seen(monkeypatch):
    build = builds.build

    def spoilt(*arguments, compute):
        bundle = build(*arguments, compute=compute)
        if compute.devices == ("cuda:0",):
            file = bundle.decode_dir / "model.safetensors"
            weights = builds.load_file(file)
            weights["model.layers.0.mlp.down_proj.weight"][0] *= 1.5
            tiny_fp8.save_file(weights, file)
        return bundle

    monkeypatch.setattr(builds, "build", spoilt)
    with PretendedDevices():
        (row,) = rows_of(builds.build_checks())
    assert row.status == "failed"
    assert "a weight differs by" in row.reason


def test_a_device_that_decides_otherwise_is_seen(monkeypatch, tmp_path):
    model, both = tiny.save(tmp_path / "model"), []
    for blocks in (1, 2):
        recipe = builds.tiny_recipe(
            tmp_path / str(blocks), model, pruning={"method": "cosine", "decode_blocks": blocks}
        )
        both.append(builds.build(recipe, tmp_path / f"bundle-{blocks}", builds.Cache(tmp_path / "cache")))
    monkeypatch.setattr(builds, "build", lambda *_, **__: both.pop(0))
    with pytest.raises(AssertionError, match=r"the CPU decides prefill .* the device prefill"):
        builds.same_build("cpu")
