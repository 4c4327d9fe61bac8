"""Which CPUs count as computing bfloat16 natively, and the dtype on the others."""

import pytest
import torch
from tinypd import make_oracle, make_plan, text, tiny

from pdtrim_deploy.local import processor
from pdtrim_deploy.models.loading import load_model
from pdtrim_deploy.models.on_devices import load_to_compute
from pdtrim_deploy.models.oracle import PDOracle

X86 = "processor\t: 0\nvendor_id\t: GenuineIntel\nflags\t\t: fpu sse2 avx2 {}\nbugs\t\t: spectre_v1\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd {}\nCPU part\t: 0xd40\n"


@pytest.mark.parametrize(
    ("cpuinfo", "dtype"),
    [
        (X86.format("avx512f avx512_bf16"), "bfloat16"),
        (X86.format("amx_bf16 amx_tile"), "bfloat16"),
        (X86.format("avx512f avx512_vnni"), "float32"),
        (X86.format(""), "float32"),
        (ARM.format("bf16 sve"), "bfloat16"),
        (ARM.format("sve svebf16x"), "float32"),
        ("a hypervisor that says nothing", "bfloat16"),
    ],
)
def test_bfloat16_is_computed_where_the_processor_says_so(cpuinfo, dtype, tmp_path, monkeypatch):
    (tmp_path / "cpuinfo").write_text(cpuinfo)
    features = processor.cpu_features(tmp_path / "cpuinfo")
    monkeypatch.setattr(processor, "cpu_features", lambda: features)
    assert processor.compute_dtype("bfloat16") == dtype
    assert processor.compute_dtype("float32") == "float32"
    assert processor.compute_dtype("float16") == "float16"


def test_a_system_without_cpuinfo_is_believed(tmp_path):
    assert processor.cpu_features(tmp_path / "none") is None


def test_without_its_instructions_only_the_arithmetic_is_float32(tiny_llama_dir, monkeypatch):
    monkeypatch.setattr(processor, "cpu_features", lambda: frozenset({"avx2"}))
    heard, rounded = [], load_model(tiny_llama_dir, "bfloat16")
    model = load_to_compute("decode", tiny_llama_dir, "bfloat16", heard.append)
    assert heard == ["loading the decode model: this CPU has no bfloat16 instructions, it computes in float32"]
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    for name, weight in rounded.state_dict().items():
        assert torch.equal(weight.float(), model.state_dict()[name].float()), name
    monkeypatch.setattr(processor, "cpu_features", lambda: frozenset({"amx_bf16"}))
    assert load_to_compute("decode", tiny_llama_dir, "bfloat16").dtype == torch.bfloat16


def test_the_pool_keeps_the_plans_dtype_whatever_is_computed_in():
    oracle = make_oracle(tiny("Qwen2"), make_plan(kv_dtype="bfloat16"))
    state = oracle.prefill(text(2, 12))
    assert {pool.dtype for pool in (*state.keys, *state.values)} == {torch.bfloat16}
    held = oracle.hand_over(state)
    assert {kv.keys.dtype for kv in held} == {torch.float32}
    assert torch.equal(held[0].keys, held[0].keys.bfloat16().float())
    exact = PDOracle(oracle.prefill_model, oracle.decode_model, make_plan()).logprobs(text(1, 12)[0], text(1, 6, 1)[0])
    assert not torch.equal(exact, oracle.logprobs(text(1, 12)[0], text(1, 6, 1)[0]))
