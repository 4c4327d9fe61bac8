"""Tiny random models of every family, saved as HF folders: 6 blocks, hidden 64, 4 heads, 2 KV heads, head 16."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable
from pathlib import Path

import familyresults
import pytest
import tinyfamilies

from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.models.families import known_family

with contextlib.suppress(ImportError):  # the environment of the documentation has none
    from hypothesis import HealthCheck, settings

    # Beside servers an example may take any time, and so may its drawing.
    settings.register_profile("busy machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("busy machine")

TINY_BLOCKS = tinyfamilies.SHARED["num_hidden_layers"]
# Files of the tests without servers from the longest, of 10 s of CPU and more. xdist hands files out in this order, so
# that what is left at the end is short and no process waits for another's.
LONGEST_FIRST = (
    "pipeline/test_step_costs", "cli/test_terminal", "pipeline/test_devices", "doctor/test_measured_memory",
    "pipeline/test_build", "pipeline/test_engines", "pipeline/test_joint_stops", "pruning/test_ray",
    "pipeline/test_search", "pipeline/test_heal", "pruning/test_finalists", "models/test_gguf",
    "pdtrim_tensorrt/test_kernel", "models/test_pypi_parts", "pdtrim_builders/test_tensorrt", "cli/test_shown",
    "evaluation/lm_harness/test_against_hflm", "serving/test_cluster", "gpucheck/test_supervise",
    "kvcache/test_gpu", "pdtrim_sglang/test_attention_backends",
)  # fmt: skip
_CHAT = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--family-results FILE`: run tests of families over all families, and write down what they prove."""
    parser.addoption("--family-results", type=Path, metavar="FILE")


def pytest_configure(config: pytest.Config) -> None:
    """Processes of xdist report to the first, which writes."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a background job, whose programs would ignore Ctrl-C
        signal.signal(signal.SIGINT, signal.default_int_handler)
    file = config.getoption("--family-results")
    if file and not hasattr(config, "workerinput"):
        config.pluginmanager.register(familyresults.FamilyResults(file))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`some_families(few, every)`: a test that costs too much to run on every architecture each time."""
    if marker := metafunc.definition.get_closest_marker("some_families"):
        few, every = marker.args
        metafunc.parametrize("architecture", every if metafunc.config.getoption("--family-results") else few)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The order of files, and `slow` for those of 10 s and more, which `make test-unit` leaves to `make test`."""
    place = {Path(__file__).parent / f"{name}.py": number for number, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))
    for item in items:
        if item.path in place:
            item.add_marker("slow")


def save_tiny_tokenizer(folder: Path) -> None:
    """Byte-level BPE without merges: 256 bytes + 3 specials, so any text goes in and comes back."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<|pad|>", "<|start|>", "<|end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate([*specials, *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in specials])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", bos_token="<|start|>", eos_token="<|end|>"
    )
    fast.chat_template = _CHAT
    fast.save_pretrained(folder)


def make_tiny(folder: Path, architecture: str = "LlamaForCausalLM", seed: int = 0, **changes: object) -> Path:
    """A random model of the family in float32 whose blocks all matter; `changes` go into its config."""
    import torch

    model_class = known_family(architecture).model_class
    config = model_class.config_class(**tinyfamilies.settings(architecture, changes))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:  # random too: ones and zeros would hide a swap
                parameter.data += 0.1 * torch.randn_like(parameter)
            if name.endswith("sinks"):  # SGLang holds them in bfloat16
                parameter.data = parameter.data.bfloat16().float()
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.data += 0.1 * torch.randn_like(buffer)
    model.save_pretrained(folder)
    save_tiny_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """A cache of this test session; nothing of the user's is touched."""
    return Cache(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """tiny_dir("Qwen2ForCausalLM"): the folder of that family's tiny model. Read it, do not write to it."""
    folders: dict[str, Path] = {}

    def folder(architecture: str) -> Path:
        if architecture not in folders:
            folders[architecture] = make_tiny(tmp_path_factory.mktemp(architecture), architecture)
        return folders[architecture]

    return folder


@pytest.fixture(scope="session")
def tiny_llama_dir(tiny_dir: Callable[[str], Path]) -> Path:
    """The tiny Llama's folder. Read it, do not write to it."""
    return tiny_dir("LlamaForCausalLM")


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., Path]:
    """tiny_model(folder, architecture="LlamaForCausalLM", seed=0, **config): save a tiny model of your own."""
    return make_tiny
