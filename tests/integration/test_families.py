"""Pairs of other families than the dense four, built and served by genuine SGLang workers: the oracle's tokens."""

import pytest
import tinyexperts
from tinyrecipe import words_recipe
from tinytext import write_words

from pdtrim_deploy.evaluation.fidelity import run_fidelity
from pdtrim_deploy.models import FAMILIES
from pdtrim_deploy.pipeline import build

pytestmark = [pytest.mark.serve, pytest.mark.timeout(900)]

SINKS = "GptOssForCausalLM"
STATES = ("Qwen3NextForCausalLM", "Qwen3_5ForCausalLM", "Qwen3_5MoeForCausalLM")
WINDOWS = ("Gemma3ForCausalLM", "MellumForCausalLM", SINKS)
LATENTS = ("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM")
SERVED = ("Qwen3MoeForCausalLM", "Phi3ForCausalLM", "Gemma3ForCausalLM", "DeepseekV2ForCausalLM", STATES[0])
CUT = {"method": "all", "n_first": 4, "n_last": 24, "wire_dtype": "int8"}
UNCUT = {"method": "none", "wire_dtype": "int4"}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_words(tmp_path_factory.mktemp("text"), files=60)


@pytest.fixture
def served(text, tiny_model, serving, cache, tmp_path):
    """`served(architecture, kv, pruning)`: the bundle, what `fidelity` says of a pair, and prefill's log."""

    def serve(architecture, kv, pruning, worker_args=(), pool_tokens=None, **config):
        source = tiny_model(tmp_path / "model", architecture, **config)
        bundle = build(words_recipe(source, text, kv, pruning=pruning), tmp_path / "bundle", cache)
        sparse = any(send.mode == "sparse" for send in bundle.plan.kv)
        options = {"dtype": "float32", "sparse": sparse, "sinks": architecture == SINKS, "extra_args": worker_args}
        options |= {"max_total_tokens": pool_tokens, "conv_dtype": bundle.plan.model.conv_dtype}
        with serving(bundle.prefill_dir, bundle.decode_dir, **options) as pair:
            result = run_fidelity(bundle, pair.url, cache, new_tokens=8)
            logs = [worker.log.read_text() for worker in pair.workers]
        assert result.max_logprob_error <= result.tolerance, result.rows
        assert all(result.controls_detected.values()), result.controls
        return bundle, result, logs

    return serve


@pytest.mark.some_families(SERVED, [*FAMILIES, "ArceeForCausalLM", "MellumForCausalLM", *LATENTS, *STATES])
def test_served_tokens_are_the_oracles(architecture, served, record_property):
    """Blocks are dropped where they are known, experts where there are any; KV is quantised, and cut.

    Not of latents, nor beside linear attention, whose kernels are torch's here (linear_attention_kernels.py).
    """
    cut = {"method": "cosine", "prefill_blocks": 1, "decode_blocks": 2} if architecture in FAMILIES else {}
    experts = architecture in tinyexperts.MOE
    config = tinyexperts.settings(architecture) if experts else {}
    pruning = cut | ({"experts": {"prefill": 6, "decode": 4}} if experts else {})
    bundle, result, _ = served(architecture, UNCUT if architecture in LATENTS + STATES else CUT, pruning, **config)
    assert len(bundle.plan.decode_layers) == (4 if cut else 6)
    assert ("window - 1" in result.controls) == (architecture in WINDOWS)
    assert ("experts one number off" in result.controls) == experts
    assert ("convolution a token old" in result.controls) == (architecture in STATES)
    record_property("family", (architecture, "served", f"off by {result.max_logprob_error:.1e} nats at most"))


def test_windows_and_sinks_in_sglangs_pools_of_windows_on_both_ends(served):
    """gpt-oss uncut: windowed layers have slots of their own in both workers, and their windows alone travel."""
    _, result, logs = served(SINKS, UNCUT | {"wire_dtype": "int8"}, {}, ("--swa-full-tokens-ratio", "1"))
    assert "window - 1" in result.controls
    assert all("SWAKVPool" in log for log in logs)


def test_prompts_may_fill_the_kv_pool_of_a_model_with_windows(served):
    """Prompts of 511 tokens on a CPU, into 600, of which SGLang's pool of windows has a part."""
    config = tinyexperts.settings("MellumForCausalLM")
    _, _, logs = served("MellumForCausalLM", UNCUT | {"wire_dtype": "int8"}, {}, pool_tokens=600, **config)
    assert not any("SWAKVPool" in log for log in logs)
