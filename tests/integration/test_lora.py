"""Adapters (LoRA) through a genuine pair under a plan that keeps all blocks, cuts layers and quantises rows.

Both workers load the adapter: prefill computes the prompt and the first token with it, decode the others. The oracle's
two models have it merged into their weights, by peft.
"""

from concurrent.futures import ThreadPoolExecutor

import httpx
import peft
import pytest
import torch
from unlikestages import SPARSE, write_stages

from pdtrim_deploy.models import open_checkpoint
from pdtrim_deploy.models.loading import load_model
from pdtrim_deploy.models.oracle import PDOracle
from pdtrim_deploy.plan import STAGES, Keep, KVSend, PDPlan

pytestmark = [pytest.mark.serve, pytest.mark.timeout(600)]
PROMPT = list(range(40, 140))
NEW = 8
TOLERANCE = 1e-3  # nats, float32
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def write_adapter(model_dir, folder):
    """A random adapter of rank 4 on all matrices."""
    model = peft.get_peft_model(load_model(model_dir), peft.LoraConfig(r=4, lora_alpha=8, target_modules=MODULES))
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data.normal_(std=0.1, generator=generator)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def plan_and_folder(tiny_llama_dir, tmp_path_factory, real_cache):
    folder = tmp_path_factory.mktemp("adapted")
    checkpoint = open_checkpoint(tiny_llama_dir, real_cache)
    int4 = SPARSE.model_copy(update={"wire_dtype": "int4"})
    kv = (SPARSE, KVSend(), KVSend(wire_dtype="int8"), int4, SPARSE, KVSend())
    plan = PDPlan(model=checkpoint.shape("float32"), prefill=(Keep(),) * 6, decode=(Keep(),) * 6, kv=kv)
    write_stages(checkpoint, folder, plan)
    write_adapter(tiny_llama_dir, folder / "adapter")
    return plan, folder


@pytest.fixture(scope="module")
def pair(plan_and_folder, serving):
    _, folder = plan_and_folder
    adapters = ("--lora-paths", f"verse={folder / 'adapter'}", "--lora-backend", "torch_native")
    options = {"page_size": 16, "chunked_prefill_size": 64, "max_total_tokens": 4096, "sparse": True}
    with serving(folder / "prefill", folder / "decode", dtype="float32", extra_args=adapters, **options) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def oracles(plan_and_folder):
    """By the adapter's name."""
    plan, folder = plan_and_folder
    plain = [load_model(folder / stage) for stage in STAGES]
    adapted = [
        peft.PeftModel.from_pretrained(load_model(folder / stage), folder / "adapter").merge_and_unload()
        for stage in STAGES
    ]
    return {None: PDOracle(*plain, plan), "verse": PDOracle(*adapted, plan)}


def generate(pair, adapter):
    """Tokens and their logprobs of an answer to PROMPT."""
    sampling = {"max_new_tokens": NEW, "temperature": 0, "ignore_eos": True}
    body = {"input_ids": PROMPT, "sampling_params": sampling, "return_logprob": True, "lora_path": adapter}
    response = httpx.post(f"{pair.url}/generate", json=body, timeout=120)
    assert response.status_code == 200, response.text
    logprobs, tokens, *_ = zip(*response.json()["meta_info"]["output_token_logprobs"], strict=True)
    return torch.tensor(tokens), torch.tensor(logprobs)


def off(oracle, answer):
    tokens, logprobs = answer
    return float((oracle.score(oracle.prefill(torch.tensor([PROMPT])), tokens[None])[0] - logprobs).abs().max())


def test_answers_are_those_of_the_merged_weights_beside_others_without(pair, oracles):
    """The prompt is the same: cached rows of one must not be the other's."""
    for adapter in (None, "verse", None, "verse"):
        answer = generate(pair, adapter)
        assert off(oracles[adapter], answer) < TOLERANCE
        assert off(oracles["verse" if adapter is None else None], answer) > 100 * TOLERANCE
    with ThreadPoolExecutor(4) as pool:  # decode has both in one batch
        for adapter, answer in zip(
            (None, "verse") * 2, pool.map(lambda adapter: generate(pair, adapter), (None, "verse") * 2), strict=True
        ):
            assert off(oracles[adapter], answer) < TOLERANCE


def test_the_model_name_chooses_an_adapter_and_an_unknown_one_is_a_400(pair):
    def text(model):
        body = {"model": model, "prompt": "Give a", "max_tokens": NEW, "temperature": 0}
        return httpx.post(f"{pair.url}/v1/completions", json=body, timeout=120)

    plain, adapted = (text(model).json()["choices"][0]["text"] for model in ("pdtrim", "pdtrim:verse"))
    assert plain != adapted
    refused = text("pdtrim:prose")
    assert (refused.status_code, "prose" in refused.text) == (400, True)
    assert text("pdtrim").json()["choices"][0]["text"] == plain
