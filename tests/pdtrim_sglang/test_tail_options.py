"""Options of SGLang with which a plan's tail is refused, and that SGLang still has them under these names."""

import argparse
import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

pytest.importorskip("sglang", reason="needs the serve environment")
from pdtrim_sglang.requirements.prompt_tail import check_prompt_tail, check_two_models
from sglang.srt.runtime_context import get_context

from pdtrim_deploy.plan import Keep, KVOnly, KVSend, ModelShape, PDPlan

SHAPE = ModelShape(architecture="X", fingerprint="f", num_blocks=2, num_kv_heads=1, head_dim=8, kv_dtype="float32")
WITHOUT = PDPlan(model=SHAPE, prefill=(Keep(), KVOnly()), decode=(Keep(),) * 2, kv=(KVSend(),) * 2)
TAILED = WITHOUT.with_parts(kv_only_tail=7)
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 64,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 100,
    "max_position_embeddings": 2048, "torch_dtype": "bfloat16",
}  # fmt: skip
PREFILL = ["--disaggregation-mode", "prefill"]
DECODE = ["--disaggregation-mode", "decode"]


@pytest.fixture(scope="module")
def parse():
    """What SGLang's own parser reads."""
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import ServerArgs

    load_plugins()
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    return lambda *words: parser.parse_args(["--model-path", "m", *words])


@pytest.fixture
def resolved(parse, tmp_path):
    """What SGLang makes of a worker's command, each value to be changed."""
    from sglang.srt.arg_groups.overrides import resolved_view
    from sglang.srt.server_args import prepare_server_args

    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    common = ["--model-path", str(tmp_path), "--device", "cpu", "--disaggregation-transfer-backend", "pdtrim_tcp"]

    def resolve(*words):
        args = prepare_server_args([*common, *words])
        args.resolve_once()
        view = resolved_view(args)
        return SimpleNamespace(**{name: getattr(view, name) for name in vars(parse()) if hasattr(view, name)})

    return resolve


def check(args, plan, graphs="disabled"):
    config = SimpleNamespace(prefill=SimpleNamespace(backend=graphs), decode=SimpleNamespace(backend="full"))
    with get_context().override_server_args(cuda_graph_config=config):
        check_prompt_tail(args, plan)


@pytest.mark.parametrize("plan", [TAILED, WITHOUT, None])
@pytest.mark.parametrize("words", [PREFILL, DECODE], ids=["prefill", "decode"])
def test_sglangs_defaults_pass(resolved, plan, words):
    """But for graphs of prefill, which a worker of a plan with a tail is started without."""
    check(resolved(*words), plan)


def test_a_worker_that_is_started_without_graphs_of_prefill_passes(resolved):
    args = resolved(*PREFILL, "--cuda-graph-backend-prefill", "disabled")
    check(args, TAILED, args.cuda_graph_config.prefill.backend)


@pytest.mark.parametrize("graphs", ["breakable", "full", "tc_piecewise"])
@pytest.mark.parametrize(
    ("words", "plan", "refused"), [(PREFILL, TAILED, True), (PREFILL, WITHOUT, False), (DECODE, TAILED, False)]
)
def test_graphs_of_prefill_are_refused_where_there_is_a_tail(resolved, graphs, words, plan, refused):
    sentence = "last 7 prompt tokens through another model.* with --cuda-graph-backend-prefill disabled"
    with pytest.raises(RuntimeError, match=sentence) if refused else nullcontext():
        check(resolved(*words), plan, graphs)


@pytest.mark.parametrize(
    ("words", "option", "value"),
    [
        (PREFILL, "--enable-two-batch-overlap", ()),
        (PREFILL, "--enable-layernorm-sp", ()),
        (PREFILL, "--enable-streaming-session", ()),
        (PREFILL, "--enable-lmcache", ()),
        (PREFILL, "--enable-flexkv", ()),
        (PREFILL, "--moe-dense-tp-size", ("1",)),  # a rank's layers have some of the rows, whatever the model
        (PREFILL, "--attn-dp-size", ("2",)),
        (PREFILL, "--enable-dp-attention", ()),
        (PREFILL, "--radix-cache-backend", ("another",)),
        (DECODE, "--disaggregation-decode-enable-radix-cache", ()),
    ],
)
def test_what_would_compute_tails_wrongly_is_refused_by_its_name(resolved, parse, words, option, value):
    """Of SGLang's own parser and its own record of arguments: a name that SGLang changes fails here."""
    args, field = resolved(*words), option[2:].replace("-", "_")
    changed = getattr(parse(option, *value), field)
    assert getattr(args, field) != changed, "a worker has it without the option"
    setattr(args, field, changed)
    check(args, WITHOUT)
    with pytest.raises(RuntimeError, match=f"last 7 prompt tokens through another model.* without .*{option}"):
        check(args, TAILED)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--cpu-offload-gb", ("1",)),
        ("--offload-group-size", ("4",)),
        ("--weight-cache-mode", ("client",)),
        ("--model-checksum", ()),
        ("--load-format", ("remote_instance",)),
    ],
)
def test_what_sglang_has_for_the_weights_of_one_model_is_refused_by_its_name(resolved, parse, option, value):
    args, field = resolved(*PREFILL), option[2:].replace("-", "_")
    check_two_models(args, TAILED)
    setattr(args, field, getattr(parse(option, *value), field))
    with pytest.raises(RuntimeError, match=f"last 7 prompt tokens through another model.* without {option}"):
        check_two_models(args, TAILED)


def test_weights_that_come_back_by_an_update_are_refused(resolved):
    args = resolved(*PREFILL)
    args.enable_memory_saver = True
    check(args, WITHOUT)
    with pytest.raises(RuntimeError, match="without --enable-memory-saver, or with --enable-weights-cpu-backup"):
        check(args, TAILED)
    args.enable_weights_cpu_backup = True
    check(args, TAILED)


def test_another_radix_cache_that_is_switched_off_passes(resolved):
    args = resolved(*PREFILL)
    args.radix_cache_backend, args.disable_radix_cache = "another", True
    check(args, TAILED)


def test_options_of_the_other_stage_pass(resolved):
    """Decode runs these layers whole, and prefill's own cache leaves tails out."""
    decode, prefill = resolved(*DECODE), resolved(*PREFILL)
    decode.enable_two_batch_overlap = decode.enable_streaming_session = True
    decode.attn_dp_size, decode.radix_cache_backend = 2, "another"
    check(decode, TAILED, "full")
    prefill.disaggregation_decode_enable_radix_cache = True
    check(prefill, TAILED)


def test_a_worker_asks_it_with_its_other_options(resolved):
    from pdtrim_sglang.requirements import check_options

    args = resolved(*PREFILL)
    args.enable_lmcache = True
    pool = SimpleNamespace(state_types=[], page_size=1)
    check_options(args, pool, WITHOUT, False)
    with pytest.raises(RuntimeError, match="last 7 prompt tokens through another model"):
        check_options(args, pool, TAILED, False)
