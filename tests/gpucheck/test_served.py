"""The parts that serve: a genuine pair on the CPU, and what is asked of which device."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from pdtrim_deploy.gpucheck import served, tiny
from pdtrim_deploy.loadtest.text import named
from pdtrim_deploy.models.loading import load_tokenizer
from pdtrim_deploy.serving import ServeEnvironment


@pytest.mark.parametrize(("device", "lacking"), [("9.0", set()), ("8.0", {"fa3", "trtllm_mha"}), ("10.0", {"fa3"})])
def test_a_device_is_asked_for_the_attention_that_it_has(monkeypatch, device, lacking):
    monkeypatch.setattr(served, "capability", lambda: device)
    backends = served.backends()
    assert {name.partition(",")[0] for name, words in backends.items() if words is None} == lacking
    assert next(iter(backends)) == "triton, full graphs"
    assert "torch_native, full graphs" not in backends
    for name, words in backends.items():
        if words:
            assert words[:2] == ("--attention-backend", name.partition(",")[0])
            assert ("--disable-cuda-graph" in words) == name.endswith("no graphs")


def test_a_check_that_raises_is_a_row_with_the_first_line_of_its_reason():
    def fails():
        raise RuntimeError("CUDA out of memory\nand a page of text")

    row = served._row("x", fails)
    assert (row.status, row.reason) == ("failed", "RuntimeError: CUDA out of memory")


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
        return served.Pair(ServeEnvironment.find().python, device="cpu")

    def test_a_tiny_pair_is_judged(self, pair, monkeypatch):
        monkeypatch.setattr(served, "ATTENTION", {"torch_native": ()})
        (row,) = served.attention_rows(pair.serve, pair)
        assert (row.part, row.status, row.reason) == ("served tiny pair: torch_native, no graphs", "run", "")
        assert row.figure["worst_error_nats"] <= row.figure["allowed_nats"]
        assert row.figure["controls_told_apart"] == row.figure["controls"] > 2

    def test_an_attention_that_does_not_start_is_a_row_with_its_reason(self, pair, monkeypatch):
        monkeypatch.setattr(served, "ATTENTION", {"flashinfer": ()})
        rows = list(served.attention_rows(pair.serve, pair))
        assert [row.status for row in rows] == ["failed", "failed"]
        assert all("decode-0" in row.reason for row in rows)

    def test_smollm2_is_judged(self, pair):
        (row,) = served.smollm2_rows(pair.serve, pair)
        assert (row.status, row.reason) == ("run", "")
        assert row.figure["controls_told_apart"] == row.figure["controls"] > 2

    def test_the_time_between_tokens_is_taken_of_both(self, pair, monkeypatch):
        monkeypatch.setattr(served, "WIDE", tiny.Size())
        monkeypatch.setattr(served, "CLIENTS", (1, 2))
        (row,) = served.itl_rows(pair.serve, pair)
        assert (row.status, row.reason) == ("run", "")
        assert all(value > 0 for value in row.figure.values())
        assert sorted(row.figure) == [f"{name}_itl_ms_{n}_clients" for name in ("cut", "dense") for n in (1, 2)]

    def test_a_transport_that_is_not_installed_is_a_row_and_tcp_goes_on(self, pair, monkeypatch):
        monkeypatch.setattr(served, "WIDE", tiny.Size())
        stock, ours, tcp = served.nixl_rows(pair.serve, pair)
        assert (tcp.status, tcp.reason) == ("run", "")
        assert tcp.figure["ttft_ms"] > 0
        for row in (stock, ours):
            assert row.status == "run" or "nixl" in row.reason.lower()


def test_speculation_is_judged_without_cut_layers(monkeypatch, tmp_path):
    judged = []

    def judge(bundle, pair):
        draft = pair.decode_args[pair.decode_args.index("--speculative-algorithm") + 3 :][:1]
        files = [load_file(Path(folder) / "model.safetensors") for folder in draft if Path(folder).is_dir()]
        judged.append((bundle.plan, pair, files))
        return {}

    monkeypatch.setattr(served, "judged", judge)
    rows = list(served.speculation_rows(tmp_path))
    assert [row.status for row in rows] == ["run"] * 2
    (plan, ngram, none), (_, eagle, (draft,)) = judged
    assert {send.mode for send in plan.kv} == {"full"}
    assert (ngram.prefill_args, none) == ((), [])  # prefill need not know
    assert "NGRAM" in ngram.decode_args
    assert eagle.prefill_args == eagle.decode_args
    assert draft["fc.weight"].shape == (256, 512)
    assert "layers.0.mlp.down_proj.weight" in draft
    assert "layers.0.input_layernorm.weight" not in draft


def test_windows_are_judged_in_the_pools_that_sglang_has(monkeypatch, tmp_path):
    """A device is no CPU: workers then keep SGLang's own choice of pools."""
    judged = []
    monkeypatch.setattr(served, "judged", lambda bundle, pair: judged.append((bundle, pair)) or {})
    monkeypatch.setattr(tiny, "WINDOWED", {name: tiny.WINDOWED[name] for name in list(tiny.WINDOWED)[:1]})
    (row,) = served.window_rows(tmp_path)
    assert (row.status, row.reason) == ("run", "")
    ((bundle, pair),) = judged
    assert {send.mode for send in bundle.plan.kv} == {"window", "full"}
    assert {send.wire_dtype for send in bundle.plan.kv} == {"int8"}
    assert pair.device == "cuda"
    assert pair.prefill_args == pair.decode_args == ()


def test_latents_are_judged_under_the_attention_that_sglang_takes(monkeypatch, tmp_path):
    judged = []
    monkeypatch.setattr(served, "judged", lambda bundle, pair: judged.append((bundle.plan, pair)) or {})
    monkeypatch.setattr(tiny, "LATENT", {name: tiny.LATENT[name] for name in list(tiny.LATENT)[:1]})
    rows = list(served.latent_rows(tmp_path))
    assert [(row.status, row.reason) for row in rows] == [("run", "")] * 2
    assert [(plan.model.head_dim, plan.model.rope_dim) for plan, _ in judged] == [(512, 64)] * 2
    assert [{send.wire_dtype for send in plan.kv} for plan, _ in judged] == [{"native"}, {"int4"}]
    assert {pair.decode_args for _, pair in judged} == {()}


def test_fp8_pools_are_judged_in_every_wire_dtype(monkeypatch, tmp_path):
    judged = []

    def judge(bundle, pair):
        judged.append((bundle.plan, pair.of(bundle)))
        return {}

    monkeypatch.setattr(served, "judged", judge)
    rows = list(served.fp8_pool_rows(tmp_path, served.Pair(tmp_path / "python", device="cpu")))
    assert [row.status for row in rows] == ["failed"] * 4  # on a CPU, by one sentence
    assert all("which SGLang 0.5.23 has on a CPU with Intel AMX alone" in row.reason for row in rows)
    assert judged == []
    monkeypatch.setattr(served.Pair, "of", lambda pair, bundle: pair)
    assert [row.status for row in served.fp8_pool_rows(tmp_path)] == ["run"] * 4
    assert {plan.model.pool_dtype for plan, _ in judged} == {"fp8_e4m3"}
    assert [plan.kv[0].wire_dtype for plan, _ in judged] == ["native", "int4", "k4v3", "int3"]
    assert [plan.kv[0].mode for plan, _ in judged] == ["sparse", "full"] * 2
