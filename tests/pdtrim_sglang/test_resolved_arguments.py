"""What SGLang makes of the commands of GPU workers: its own resolution, told that it runs on an H100 or a B200."""

import json
import os
from pathlib import Path

import pytest

pytest.importorskip("sglang", reason="needs the serve environment")

from pdtrim_deploy.manifests import BundleAt, Options, Served, compose, kubernetes
from pdtrim_deploy.serving import ClusterSpec, WorkerOptions
from pdtrim_deploy.serving.commands import worker_command

# Of Llama-3.1-8B, with fewer layers.
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 4, "vocab_size": 128256,
    "max_position_embeddings": 131072, "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16",
    "bos_token_id": 1, "eos_token_id": 2, "head_dim": 128,
}  # fmt: skip
BLACKWELL = ("is_sm100", "is_sm100_or_sm110", "is_blackwell")
HOPPER = ("is_sm90", "is_hopper_with_cuda_12_3")
GPUS = {"sm_90": (HOPPER, BLACKWELL, (9, 0)), "sm_100": (BLACKWELL, HOPPER, (10, 0))}
PREFILL_ATTENTION = {"sm_90": "fa3", "sm_100": "trtllm_mha"}
SOURCES = ["serve", "kubernetes", "compose"]


@pytest.fixture(params=GPUS)
def gpu(request, monkeypatch):
    from sglang.srt.plugins import load_plugins
    from sglang.srt.runtime_context import override_platform

    load_plugins()
    yes, no, capability = GPUS[request.param]
    facts = {"is_cuda": True, "is_sm120": False, "has_flashinfer": True} | dict.fromkeys(yes, True)
    sm = 10 * capability[0] + capability[1]
    before = dict(os.environ)
    monkeypatch.setattr("sglang.srt.utils.is_cuda", lambda: True)
    with override_platform(**facts | dict.fromkeys(no, False), device_sm=sm, device_capability=capability):
        yield request.param
    os.environ.clear()  # SGLang's resolution sets some
    os.environ.update(before)


@pytest.fixture
def model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def commands(
    source: str,
    model: Path,
    sparse: bool,
    dtype: str = "bfloat16",
    tail: bool = False,
    prefill_args: tuple[str, ...] = (),
) -> dict[str, list[str]]:
    """Arguments of `sglang.launch_server`, by stage."""
    if source == "serve":
        options = WorkerOptions(
            device="cuda", dtype=dtype, sparse=sparse, tail=tail, tp_prefill=2, tp_decode=2, prefill_args=prefill_args
        )
        workers = ClusterSpec.on_loopback(model, model, options=options, gpus=4).workers
        return {worker.role: worker_command(Path("python"), worker)[3:] for worker in workers}
    rendered = rendered_as(source, Served("m", "ab" * 32, dtype, sparse, tail=tail), prefill_args)
    for stage, words in rendered.items():
        words[words.index("--model-path") + 1] = str(model)
        words += ["--device", "cuda"]  # SGLang would find it on the pod
        assert words[words.index("--disaggregation-mode") + 1] == stage
    return rendered


def rendered_as(source: str, served: Served, prefill_args: tuple[str, ...]) -> dict[str, list[str]]:
    options = Options(tp_prefill=2, tp_decode=2, bundle=BundleAt("host", "/srv/b"), prefill_args=prefill_args)
    if source == "compose":
        services = compose(served, options)["services"]
        commands = {stage: services[f"{stage}-0"]["command"] for stage in ("prefill", "decode")}
        return {stage: [word.replace("$$", "$") for word in command[3:]] for stage, command in commands.items()}
    workers = {stage: kubernetes(served, options)[f"{stage}.yaml"] for stage in ("prefill", "decode")}
    return {
        stage: list(document["spec"]["template"]["spec"]["containers"][0]["command"][3:])
        for stage, documents in workers.items()
        for document in documents
        if document["kind"] == "Deployment"
    }


def resolved(words: list[str]):
    from sglang.srt.arg_groups.overrides import resolved_view
    from sglang.srt.server_args import prepare_server_args

    args = prepare_server_args(words)
    args.resolve_once()
    return resolved_view(args)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("sparse", [True, False])
def test_gpu_workers_get_the_attention_graphs_and_pages_that_they_should(gpu, model, source, sparse):
    from sglang.srt.arg_groups.overrides import attention_backends_of

    stages = {stage: resolved(words) for stage, words in commands(source, model, sparse).items()}
    prefill, decode = stages["prefill"], stages["decode"]
    assert attention_backends_of(prefill)[0] == PREFILL_ATTENTION[gpu]
    assert attention_backends_of(decode)[1] == ("triton" if sparse else PREFILL_ATTENTION[gpu])
    assert prefill.cuda_graph_config.prefill.backend == "breakable"
    assert decode.cuda_graph_config.decode.backend == "full"
    assert prefill.page_size == decode.page_size == 64
    assert prefill.tp_size == decode.tp_size == 2
    for stage in stages.values():
        assert (stage.max_total_tokens, stage.max_running_requests) == (None, None)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    ("arguments", "backend"),
    [
        ((), "disabled"),
        (("--cuda-graph-backend-prefill", "breakable"), "breakable"),
        (("--cuda-graph-config", '{"prefill": {"backend": "full"}}'), "full"),
        (("--disable-prefill-cuda-graph",), "disabled"),
    ],
)
def test_a_plan_with_a_tail_has_no_graphs_of_prefill_unless_a_caller_says_so(gpu, model, source, arguments, backend):
    words = commands(source, model, sparse=True, tail=True, prefill_args=arguments)
    assert resolved(words["prefill"]).cuda_graph_config.prefill.backend == backend
    assert resolved(words["decode"]).cuda_graph_config.decode.backend == "full"


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("sparse", [True, False])
def test_float32_has_an_attention_that_computes_in_it(gpu, model, source, sparse):
    """fa3 and trtllm_mha, which SGLang would take, have no kernels for it."""
    from sglang.srt.arg_groups.overrides import attention_backends_of

    for words in commands(source, model, sparse, "float32").values():
        assert attention_backends_of(resolved(words)) == ("triton", "triton")


def test_a_page_of_one_token_would_differ_between_the_stages_of_a_b200(gpu, model):
    """Why the page is chosen: with SGLang's old default, prefill alone is given 64."""
    words = commands("serve", model, sparse=True)
    pages = {}
    for stage, arguments in words.items():
        arguments[arguments.index("--page-size") + 1] = "1"
        pages[stage] = resolved(arguments).page_size
    assert pages == {"prefill": 64 if gpu == "sm_100" else 1, "decode": 1}
