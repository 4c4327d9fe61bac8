"""GGUF files of tiny models, written with gguf-py as llama.cpp's converter writes them."""

import gguf
import numpy as np

from pdtrim_deploy.models.sources.gguf_file import _BLOCK, _BLOCK_OF, _TOP

PIECES = ["▁", "t", "h", "e", "▁t", "▁th", "▁the", "he", "r", "er", "her", "▁▁", "\n\n"]


def gguf_name(name, arch="llama"):
    top = {hf: gguf for gguf, hf in _TOP.items()}
    block = {hf: gguf for gguf, hf in _BLOCK_OF.get(arch, _BLOCK).items()}
    stem, kind = name.rsplit(".", 1)
    if stem in top:
        return f"{top[stem]}.{kind}"
    _, _, index, inner = stem.split(".", 3)
    return f"blk.{index}.{block[inner]}.{kind}"


def permute(weights, heads):
    """llama.cpp's convert_hf_to_gguf.py, LlamaModel.permute."""
    rows = weights.shape[0] // heads // 2
    return weights.reshape(heads, 2, rows, *weights.shape[1:]).swapaxes(1, 2).reshape(weights.shape)


def write_gguf(path, model, arch, spoil=lambda writer: None, quant=gguf.GGMLQuantizationType.F32, pre="smollm"):
    c = model.config
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_key_length(16)
    writer.add_rope_freq_base(c.rope_parameters.get("full_attention", c.rope_parameters)["rope_theta"])
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    if arch == "gemma3":
        _add_pieces(writer, c.vocab_size)
        writer.add_sliding_window(c.sliding_window)
    else:
        _add_bytes(writer, c.vocab_size, pre)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    spoil(writer)
    heads = {"q_proj": c.num_attention_heads, "k_proj": c.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        array = tensor.float().numpy()
        projection = name.split(".")[-2]
        if arch == "llama" and projection in heads:
            array = permute(array, heads[projection])
        if arch == "gemma3" and name.endswith("norm.weight"):
            array = array + 1
        if arch == "gemma3" and name == "lm_head.weight":
            continue  # tied
        kind = quant if array.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(gguf_name(name, arch), gguf.quantize(np.ascontiguousarray(array), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_pieces(writer, count):
    """A vocabulary as Gemma's: markers, pieces with scores, and every byte."""
    marks, raw = ["<pad>", "<eos>", "<bos>", "<unk>"], [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = [*marks, *PIECES, *raw]
    tokens += [f"<unused{i}>" for i in range(count - len(tokens))]
    scores = [-1000.0] * 4 + [-float(i) for i in range(len(PIECES))] + [-1000.0] * (count - 4 - len(PIECES))
    types = [3] * 4 + [4 if piece in ("▁▁", "\n\n") else 1 for piece in PIECES] + [6] * 256
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types([*types, *[3] * (count - len(types))])
    for name, number in (("pad", 0), ("eos", 1), ("bos", 2), ("unk", 3)):
        getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(True)


def _add_bytes(writer, count, pre):
    alphabet = [chr(i) for i in [*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324)]]
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *alphabet, "Ġt", "12"]
    tokens += [f"[unused{i}]" for i in range(count - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges(["Ġ t", "1 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
