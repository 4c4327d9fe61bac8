"""Ranks divide requests among each other (DP attention), in decode and in prefill: the oracle's tokens, on a CPU.

Of a tiny Qwen3, whose plan has all wire dtypes and cut layers: SGLang 0.5.23's Llama and Qwen2 know no DP attention
(`requirements/dp_attention.py`), and are refused. In one pair a rank of prefill holds all heads, and in decode two
ranks share a request's heads, and its full layer keeps prompts (radix cache); in the other prefill's two ranks share
the heads, and each of decode's holds all.
"""

from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from bundle_variants import mixed, variant
from tinyrecipe import words_recipe
from tinytext import write_words

from pdtrim_deploy.errors import ServingError
from pdtrim_deploy.evaluation.fidelity import run_fidelity
from pdtrim_deploy.gpucheck.options import DP_ATTENTION, RADIX
from pdtrim_deploy.pipeline import build
from pdtrim_deploy.serving.metrics import scrape, total

pytestmark = [pytest.mark.serve, pytest.mark.timeout(900)]
OPTIONS = {"dtype": "float32", "page_size": 16, "chunked_prefill_size": 128}  # 64 for each group of two
LENGTHS = (1, 40, 97, 333)


@pytest.fixture(scope="module")
def bundle(tiny_model, cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("grouped")
    text = write_words(folder / "text", files=60, words=1600)
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32}
    model = tiny_model(folder / "model", "Qwen3ForCausalLM", num_hidden_layers=8, **heads)
    recipe = words_recipe(model, text, {"method": "all", "n_first": 4, "n_last": 24})
    whole = build(recipe, folder / "bundle", cache)
    return variant(whole, mixed(whole), folder / "mixed")


def generate(pair, tokens, new_tokens=4):
    sampling = {"max_new_tokens": new_tokens, "temperature": 0, "ignore_eos": True}
    response = httpx.post(f"{pair.url}/generate", json={"input_ids": tokens, "sampling_params": sampling}, timeout=120)
    assert response.status_code == 200, response.text
    return response.json()


def reused(pair):
    """Tokens of prompts whose rows decode had."""
    return total(scrape(pair.workers[0].metrics_url), "pdtrim_kv_reused_tokens_sum")


@pytest.mark.parametrize(
    ("ranks", "senders"),
    [
        ({"tp_prefill": 2, "tp_decode": 4, "prefill_args": DP_ATTENTION, "decode_args": (*DP_ATTENTION, *RADIX)}, 1),
        ({"tp_prefill": 2, "tp_decode": 2, "decode_args": DP_ATTENTION}, 2),
    ],
    ids=["groups in both stages", "plain ranks to groups"],
)
def test_served_tokens_are_the_oracles_and_bytes_the_arithmetics(bundle, serving, transfers, cache, ranks, senders):
    """`senders` are the ranks of prefill that hold rows of one request, and count it."""
    plan, keeps_prompts = bundle.plan, RADIX[0] in ranks["decode_args"]
    with serving(bundle.prefill_dir, bundle.decode_dir, **ranks, **OPTIONS) as pair:
        result = run_fidelity(bundle, pair.url, cache, new_tokens=4)
        assert result.passed, result.problems
        prompts = [[3 + (7 * place + length) % 250 for place in range(length)] for length in LENGTHS]
        before, known = transfers(pair), reused(pair)
        alone = [generate(pair, prompt)["output_ids"] for prompt in prompts]
        after = transfers(pair, senders * len(LENGTHS), before)
        assert reused(pair) == known, "these prompts were to be new"
        # together in both groups, whose batches have unlike sizes
        with ThreadPoolExecutor(8) as threads:
            answers = list(threads.map(lambda prompt: generate(pair, prompt), prompts * 4))
        assert [answer["output_ids"] for answer in answers] == alone * 4
        assert {answer["meta_info"]["dp_rank"] for answer in answers} == {0, 1}
        assert (reused(pair) > known) == keeps_prompts
    moved = {name: after[name] - before[name] for name in after}
    assert moved["success"] == senders * len(LENGTHS)
    assert moved["payload"] == sum(map(plan.payload_bytes, LENGTHS))
    assert moved["dense"] == sum(map(plan.dense_bytes, LENGTHS))


def test_a_model_that_knows_no_dp_attention_is_refused(serving, tiny_dir):
    model = tiny_dir("LlamaForCausalLM")
    with (
        pytest.raises(ServingError, match=r"LlamaForCausalLM sums over ranks .*: start without --attn-dp-size"),
        serving(model, model, tp_decode=2, decode_args=DP_ATTENTION, **OPTIONS),
    ):
        pass
