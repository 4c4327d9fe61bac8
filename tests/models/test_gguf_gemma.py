"""Gemma-3 from GGUF: norms, keys that the file leaves out, and its tokenizer of pieces."""

from __future__ import annotations

import json

import pytest
import torch

gguf = pytest.importorskip("gguf")

from tinygguf import write_gguf  # noqa: E402

from pdtrim_deploy.errors import UserError  # noqa: E402
from pdtrim_deploy.models import resolve  # noqa: E402
from pdtrim_deploy.models.loading import check_loads, load_model, load_tokenizer  # noqa: E402
from pdtrim_deploy.models.sources.gguf_gemma import gemma_keys  # noqa: E402

ROPE = {kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in
        (("sliding_attention", 10000.0), ("full_attention", 1000000.0))}  # fmt: skip


@pytest.fixture(scope="module")
def converted(tiny_model, tmp_path_factory, cache):
    folder = tmp_path_factory.mktemp("gemma")
    published = {"sliding_window_pattern": 6, "num_hidden_layers": 7, "rope_parameters": ROPE}
    model = load_model(tiny_model(folder / "m", "Gemma3ForCausalLM", **published))
    return model, resolve(f"gguf:{write_gguf(folder / 'm.gguf', model, 'gemma3')}", cache)


@torch.no_grad()
def test_round_trip(converted):
    model, checkpoint = converted
    check_loads(checkpoint)
    back = load_model(checkpoint.path)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(back.state_dict()[name], tensor, atol=1e-6, rtol=0)
    ids = torch.arange(3, 43)[None]
    torch.testing.assert_close(back(ids).logits, model(ids).logits, atol=1e-4, rtol=0)
    windows = checkpoint.shape().windows
    assert [window is None for window in windows] == [block == 5 for block in range(7)]


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("the", ["t", "he"]),  # scores: `he` before `th`, which is no piece without a space
        (" there", ["▁the", "r", "e"]),
        (" the  here", ["▁the", "▁▁", "her", "e"]),
        ("\n\nthe\n", ["\n\n", "t", "he", "<0x0A>"]),
        ("é", ["<0xC3>", "<0xA9>"]),
        ("<eos>the", ["<eos>", "t", "he"]),
    ],
)
def test_pieces(converted, text, pieces):
    tokenizer = load_tokenizer(converted[1].path)
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<bos>", *pieces]
    assert tokenizer.decode(ids[1:]) == text


def test_the_largest_size_scales_its_queries_by_another_width():
    meta = {"gemma3.attention.sliding_window": 1024}
    sizes = {"head_dim": 128, "hidden_size": 5376, "num_attention_heads": 32}
    assert gemma_keys(meta, sizes | {"num_hidden_layers": 62}, "f")["query_pre_attn_scalar"] == 168
    assert gemma_keys(meta, sizes | {"num_hidden_layers": 48}, "f")["query_pre_attn_scalar"] == 128
    with pytest.raises(UserError, match=r"GGUF key gemma3.final_logit_softcapping is not read"):
        gemma_keys(meta | {"gemma3.final_logit_softcapping": 30.0}, sizes, "f")


def test_another_tokenizer_of_pieces_is_refused(tiny_llama_dir, cache, tmp_path):
    model = load_model(tiny_llama_dir)

    def pieces(writer):
        writer.kv_data[0]["tokenizer.ggml.model"].value = "llama"

    with pytest.raises(UserError, match="tokenizer 'llama' with pre-tokenizer 'smollm' cannot be read from GGUF"):
        resolve(f"gguf:{write_gguf(tmp_path / 'm.gguf', model, 'llama', spoil=pieces)}", cache)
    assert json.loads((tiny_llama_dir / "config.json").read_text())["model_type"] == "llama"
