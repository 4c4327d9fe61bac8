"""The parts that serve: a genuine pair on the CPU, and what is asked of which device."""

from pathlib import Path

import pytest
from pdtrim_tensorrt.engine_check import tensorrt_checks
from safetensors.torch import load_file

from pdtrim_deploy.gpucheck import attention, bundles, options, pair, plans, pools, timed, tiny
from pdtrim_deploy.gpucheck.checks import rows_of
from pdtrim_deploy.gpucheck.registry import PARTS
from pdtrim_deploy.loadtest.text import named
from pdtrim_deploy.models.loading import load_tokenizer
from pdtrim_deploy.serving import ServeEnvironment


@pytest.fixture
def judged(monkeypatch):
    """Bundles and pairs that would be served, and their loads; none is started."""
    served = []
    monkeypatch.setattr(pair, "judged", lambda *arguments: served.append(arguments[:3]) or {})
    return served


@pytest.mark.parametrize(("device", "lacking"), [("9.0", set()), ("8.0", {"fa3", "trtllm_mha"}), ("10.0", {"fa3"})])
def test_a_device_is_asked_for_the_attention_that_it_has(monkeypatch, tmp_path, device, lacking):
    monkeypatch.setattr(attention, "capability", lambda: device)
    graphs, plain = (part(tmp_path, tmp_path) for part in (attention.attention_checks, attention.no_graphs_checks))
    assert {check.name.split()[1].strip(",") for check in graphs if check.skip} == lacking
    assert [check.name for check in graphs][:2] == [
        "attention: triton, full graphs",
        "attention: torch_native, no graphs",
    ]
    assert [check.name.split()[1].strip(",") for check in plain] == ["triton", "flashinfer", "fa3", "trtllm_mha"]
    assert {check.name.partition(", ")[2] for check in plain} == {"no graphs"}


def test_each_backend_is_timed_while_its_pair_is_up(monkeypatch, tmp_path, judged):
    monkeypatch.setattr(attention, "capability", lambda: "9.0")
    monkeypatch.setattr(bundles, "tiny_bundle", lambda *_, **__: "bundle")
    for part in (attention.attention_checks, attention.no_graphs_checks):
        assert {row.status for row in rows_of(part(tmp_path, tmp_path))} == {"run"}
    assert len(judged) == 5 + 4
    for bundle, variant, loads in judged:
        assert (bundle, sorted(loads)) == ("bundle", [1, 16])
        assert variant.decode_args[0] == "--attention-backend"
    plain = [variant.decode_args[1] for _, variant, _ in judged if "--disable-cuda-graph" in variant.decode_args]
    assert plain == ["torch_native", "triton", "flashinfer", "fa3", "trtllm_mha"]


@pytest.mark.parametrize("device", ["8.0", "9.0", "10.0"])
def test_a_part_has_time_to_begin_its_checks(monkeypatch, tmp_path, device):
    """Where the time is short: the first rows of each part, all but one of a device that has every attention."""
    monkeypatch.setattr(attention, "capability", lambda: device)
    for name, part in {
        "served": attention.attention_checks, "smollm2": plans.smollm2_checks, "itl": timed.itl_checks,
        "nixl": timed.nixl_checks, "mooncake": timed.mooncake_checks, "tensorrt": tensorrt_checks,
    }.items():  # fmt: skip
        needed = [check.seconds for check in part(tmp_path, tmp_path) if not check.skip]
        least = needed[:2] if name in ("nixl", "mooncake") else needed  # stock and ours; the rest where time is left
        assert sum(least) <= PARTS[name].seconds, name


@pytest.mark.parametrize("name", [name for name in PARTS if PARTS[name].serves])
def test_nothing_is_built_before_a_check_and_all_names_differ(name, tmp_path):
    module, _, function = PARTS[name].function.partition(":")
    listed = getattr(__import__(module, fromlist=[function]), function)(tmp_path, tmp_path / "built")
    assert len({check.name for check in listed}) == len(listed) > 0
    assert list(tmp_path.iterdir()) == []
    assert all(check.seconds >= 10 for check in listed)


def test_a_model_that_is_not_here_is_skipped(monkeypatch, tmp_path):
    monkeypatch.setattr(plans, "RECIPES", tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (row,) = rows_of(plans.smollm2_checks(tmp_path, tmp_path))
    assert row.status == "skipped"
    assert row.reason.startswith("the model or its text is not here: ")


@pytest.mark.parametrize(("device", "dtype"), [("cuda", "bfloat16"), ("cpu", "float32")])
def test_smollm2_is_in_a_dtype_that_its_device_attends_in(monkeypatch, tmp_path, judged, device, dtype):
    monkeypatch.setattr(plans, "build", lambda recipe, *_: recipe)
    (row,) = rows_of(plans.smollm2_checks(tmp_path, tmp_path, pair.Pair(tmp_path, device=device)))
    assert row.status == "run"
    assert judged[0][0].model.dtype == dtype


ONE_GPU = "needs 2 GPUs, and workers see 1 here (nvidia-smi, CUDA_VISIBLE_DEVICES)"


@pytest.mark.parametrize(("visible", "skip"), [("1", ONE_GPU), ("0,1", "")])
def test_ranks_need_gpus_of_their_own(monkeypatch, tmp_path, visible, skip):
    """Of those that `serve` may use, and not of all that the machine has."""
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nprintf 'GPU 0: X (UUID: GPU-0)\\nGPU 1: X (UUID: GPU-1)\\n'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert {check.skip for check in options.rank_checks(tmp_path, tmp_path)} == {skip}


def test_ranks_are_unlike_copied_and_data_parallel(monkeypatch, tmp_path, judged):
    monkeypatch.setattr(options, "gpu_count", lambda: 2)
    monkeypatch.setattr(bundles, "tiny_bundle", lambda folder, kv, size, **more: (size, more.get("architecture")))
    assert {row.status for row in rows_of(options.rank_checks(tmp_path, tmp_path))} == {"run"}
    variants = [
        (size.num_key_value_heads, architecture, variant.tp_prefill, variant.tp_decode, variant.decode_args)
        for (size, architecture), variant, _ in judged
    ]
    assert variants == [
        (2, None, 2, 1, ()),
        (2, None, 1, 2, ()),
        (1, None, 2, 2, ()),
        (2, "Qwen3ForCausalLM", 1, 2, options.DP_ATTENTION),
    ]


def test_plans_compute_less_and_move_keys(tmp_path, judged):
    assert {row.status for row in rows_of(plans.plan_checks(tmp_path, tmp_path))} == {"run"}
    graphs, plain, tail, sublayers, offsets, _, bfloat16, float32 = (
        (bundle.plan, variant) for bundle, variant, _ in judged
    )
    assert graphs[0] == plain[0]
    assert {block.kind for block in graphs[0].prefill} >= {"kv_only"}
    assert [plan.kv_only_tail for plan, _ in (graphs, plain, tail)] == [0, 0, 16]
    assert (graphs[1].prefill_args, plain[1].prefill_args) == ((), ("--cuda-graph-backend-prefill", "disabled"))
    assert {block.kind for block in sublayers[0].decode} >= {"without_attention", "without_mlp"}
    assert offsets[0].key_offsets.scaled
    assert bfloat16[0].model.kv_dtype == "bfloat16"
    assert {send.mode for send in bfloat16[0].kv} == {"sparse"}
    assert float32[0].model.kv_dtype == "float32"
    assert {send.mode for send in offsets[0].kv} == {"sparse"}


def test_words_of_the_load_test_are_one_token_each(tmp_path):
    """A transfer of 3,000 tokens is one, and fits the model's 4,096."""
    tokenizer = load_tokenizer(tiny.save(tmp_path / "model"))
    assert 3000 <= len(tokenizer(named("a", 3000))["input_ids"]) <= 3010
    assert tokenizer.decode(tokenizer("안 é 👍")["input_ids"]) == "안 é 👍"


@pytest.mark.serve
@pytest.mark.timeout(900)
class TestOnTheCPU:
    """What serves, on the device that every machine has: `make test-gpu-check`."""

    @pytest.fixture
    def pair(self):
        return pair.Pair(ServeEnvironment.find().python, device="cpu")

    def test_a_tiny_pair_is_judged_and_timed(self, pair, monkeypatch, tmp_path):
        monkeypatch.setattr(attention, "ATTENTION", {"torch_native": ()})
        monkeypatch.setattr(attention, "CLIENTS", (1, 2))
        (row,) = rows_of(attention.attention_checks(pair.serve, tmp_path, pair))
        assert (row.part, row.status, row.reason) == ("attention: torch_native, no graphs", "run", "")
        assert row.figure["worst_error_nats"] <= row.figure["allowed_nats"]
        assert row.figure["controls_told_apart"] == row.figure["controls"] > 2
        assert row.figure["itl_ms_1_clients"] > 0 < row.figure["itl_ms_2_clients"]

    def test_an_attention_that_does_not_start_is_a_row_with_its_reason(self, pair, monkeypatch, tmp_path):
        monkeypatch.setattr(attention, "ATTENTION", {"flashinfer": ()})
        (row,) = rows_of(attention.attention_checks(pair.serve, tmp_path, pair))
        assert row.status == "failed"
        assert "decode-0" in row.reason

    def test_smollm2_is_judged(self, pair, tmp_path):
        (row,) = rows_of(plans.smollm2_checks(pair.serve, tmp_path, pair))
        assert (row.status, row.reason) == ("run", "")
        assert row.figure["controls_told_apart"] == row.figure["controls"] > 2

    def test_the_time_between_tokens_is_taken_of_both_plans_and_of_sglang_alone(self, pair, monkeypatch, tmp_path):
        monkeypatch.setattr(timed, "WIDE", tiny.Size())
        monkeypatch.setattr(timed, "CLIENTS", (1, 2))
        rows = list(rows_of(timed.itl_checks(pair.serve, tmp_path, pair)))
        assert [(row.part, row.status, row.reason) for row in rows] == [
            (f"ITL: {name}", "run", "") for name in ("cut plan", "dense plan", "SGLang alone, dense")
        ]
        for row in rows:
            assert sorted(row.figure) == [f"itl_ms_{n}_clients" for n in (1, 2)]
            assert all(value > 0 for value in row.figure.values())

    def test_a_transport_that_is_not_installed_is_a_row_and_tcp_goes_on(self, pair, monkeypatch, tmp_path):
        monkeypatch.setattr(timed, "WIDE", tiny.Size())
        stock, ours, tcp = rows_of(timed.nixl_checks(pair.serve, tmp_path, pair))
        assert (tcp.status, tcp.reason) == ("run", "")
        assert tcp.figure["ttft_ms"] > 0
        for row in (stock, ours):
            assert row.status == "run" or "nixl" in row.reason.lower()


def test_speculation_is_judged_without_cut_layers(tmp_path, judged):
    rows = list(rows_of(options.speculation_checks(tmp_path, tmp_path)))
    assert [row.status for row in rows] == ["run"] * 2
    (bundle, ngram, _), (_, eagle, _) = judged
    assert {send.mode for send in bundle.plan.kv} == {"full"}
    assert ngram.prefill_args == ()  # prefill need not know
    assert "NGRAM" in ngram.decode_args
    assert eagle.prefill_args == eagle.decode_args
    draft = load_file(Path(eagle.decode_args[-1]) / "model.safetensors")
    assert draft["fc.weight"].shape == (256, 512)
    assert "layers.0.mlp.down_proj.weight" in draft
    assert "layers.0.input_layernorm.weight" not in draft


def test_windows_are_judged_in_the_pools_that_sglang_has(monkeypatch, tmp_path, judged):
    """A device is no CPU: workers then keep SGLang's own choice of pools."""
    monkeypatch.setattr(tiny, "WINDOWED", {name: tiny.WINDOWED[name] for name in list(tiny.WINDOWED)[:1]})
    (row,) = rows_of(pools.window_checks(tmp_path, tmp_path))
    assert (row.status, row.reason) == ("run", "")
    ((bundle, variant, _),) = judged
    assert {send.mode for send in bundle.plan.kv} == {"window", "full"}
    assert {send.wire_dtype for send in bundle.plan.kv} == {"int8"}
    assert variant.device == "cuda"
    assert variant.prefill_args == variant.decode_args == ()


def test_latents_are_judged_under_the_attention_that_sglang_takes(monkeypatch, tmp_path, judged):
    monkeypatch.setattr(tiny, "LATENT", {name: tiny.LATENT[name] for name in list(tiny.LATENT)[:1]})
    rows = list(rows_of(pools.latent_checks(tmp_path, tmp_path)))
    assert [(row.status, row.reason) for row in rows] == [("run", "")] * 2
    assert [(b.plan.model.head_dim, b.plan.model.rope_dim) for b, _, _ in judged] == [(512, 64)] * 2
    assert [{send.wire_dtype for send in b.plan.kv} for b, _, _ in judged] == [{"native"}, {"int4"}]
    assert {variant.decode_args for _, variant, _ in judged} == {()}


def test_states_are_judged_beside_native_rows(monkeypatch, tmp_path, judged):
    rows = list(rows_of(pools.state_checks(tmp_path, tmp_path)))
    assert [(row.status, row.reason) for row in rows] == [("run", "")] * 2
    assert [b.plan.model.architecture for b, _, _ in judged] == list(tiny.STATEFUL)
    assert [b.plan.decode_kv_blocks for b, _, _ in judged] == [(1, 3)] * 2
    assert {send.wire_dtype for b, _, _ in judged for send in b.plan.kv} == {"native"}
    assert {(b.plan.model.states.conv_dtype, b.plan.model.kv_dtype) for b, _, _ in judged} == {("float16",) * 2}
    assert {variant.decode_args for _, variant, _ in judged} == {()}


def test_fp8_pools_are_judged_in_every_wire_dtype(monkeypatch, tmp_path, judged):
    rows = list(rows_of(pools.fp8_pool_checks(tmp_path, tmp_path)))
    assert [row.status for row in rows] == ["run"] * 5
    plans_judged = [bundle.plan for bundle, _, _ in judged]
    assert [plan.model.pool_dtype for plan in plans_judged] == ["fp8_e4m3"] * 4 + ["fp8_e5m2"]
    assert [plan.kv[0].wire_dtype for plan in plans_judged] == ["native", "int4", "k4v3", "int3", "native"]
    assert [plan.kv[0].mode for plan in plans_judged] == ["sparse", "full"] * 2 + ["sparse"]
