"""Builds and judgements on GPUs: the CPU's own results, bit for bit, on devices that are pretended (no GPU is here)."""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pretended_devices import HOST, OnFirst, OnSecond, PretendedDevices, device_of
from tinytext import write_words

from pdtrim_deploy.bundle import Bundle
from pdtrim_deploy.evaluation.fidelity.cases import Group
from pdtrim_deploy.evaluation.fidelity.check import FidelityResult, judge
from pdtrim_deploy.evaluation.fidelity.client import Served
from pdtrim_deploy.evaluation.judge_tasks import judge_tasks
from pdtrim_deploy.evaluation.quality import judge_bundle
from pdtrim_deploy.kvcache.key_offsets import KeyOffsets
from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.local.compute import ON_CPU, Compute
from pdtrim_deploy.models.blockwise import Blockwise
from pdtrim_deploy.models.on_devices import load_on, load_to_compute
from pdtrim_deploy.models.oracle import PDOracle
from pdtrim_deploy.pipeline import build
from pdtrim_deploy.plan import STAGES
from pdtrim_deploy.pruning.healing.paired import PairedTest
from pdtrim_deploy.recipe import Recipe

FIRST, BOTH = Compute(("cuda:0",)), Compute(("cuda:0", "cuda:1"))
PLACES = (ON_CPU, BOTH, Compute(blocks_in_memory=2, state_bytes=1 << 16), FIRST.with_blocks(1))
PARTS = 5
QUICK = ("fingerprint", "tensors to write", "hashing", "writing", "loading")
PRUNING: dict[str, Any] = {"prefill_blocks": 1, "decode_blocks": 2}
KV: dict[str, Any] = {"sequences": 3, "prompt_tokens": 40, "continuation_tokens": 6}
SECTIONS: dict[str, dict[str, Any]] = {
    "search, effects and offsets": {
        "pruning": PRUNING | {"method": "greedy", "objective": "kl", "blocks_in_memory": 2, "disk_mb": 1},
        "kv": KV | {"method": "budget", "reduction": 3.0, "sparse_choices": [[4, 8]], "wire_choices": ["int8", "int4"]},
    },
    "students, least squares and gradients": {
        "pruning": PRUNING | {"method": "anneal", "steps": 8, "distil": True, "finalists": 2, "threshold": 0.1},
        "calibration": {"continuations": "sampled"},
        "students": {"steps": 2},
        "healing": {
            "compensation": "least-squares", "sequences": 8, "length": 32, "prefill_steps": 3, "decode_steps": 3,
            "kv_steps": 3, "batch": 2,
        },
        "kv": KV | {"method": "attention-mass", "sparse_layers": 1, "n_first": 2, "n_last": 4, "wire_dtype": "fp8"},
    },
    "experts": {
        "model": "Qwen3MoeForCausalLM",
        "pruning": PRUNING | {"method": "cosine", "experts": {"prefill": 3, "decode": 2}},
        "kv": {"method": "none", "wire_dtype": "int8"},
    },
    "a target": {
        "target": {"itl": 0.85, "ttft": 0.85, "kv": 3.0, "rounds": 1},
        "kv": KV | {"method": "budget", "sparse_choices": [[2, 4]], "wire_choices": ["int8", "int4"], "sequences": 8},
        "healing": {"compensation": "least-squares", "sequences": 8, "length": 32},
    },
    "norm, K and V alone, LoRA": {
        "pruning": PRUNING | {"prefill_blocks": 0, "method": "streamline"},
        "healing": {
            "compensation": "norm", "kv_only_blocks": 1, "sequences": 8, "length": 32, "decode_steps": 4,
            "method": "lora", "batch": 2,
        },
        "kv": KV | {"method": "measured-harm", "sparse_layers": 1, "n_first": 2, "n_last": 4, "wire_dtype": "int8"},
    },
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _trained_weights_are_kept() -> Iterator[None]:
    """Better or not: a few steps make them differ."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PairedTest, "kept", True)
        yield


@pytest.fixture(scope="module")
def recipe_of(tmp_path_factory: pytest.TempPathFactory, tiny_dir: Callable[[str], Path]) -> Callable[[str], Recipe]:
    folder = tmp_path_factory.mktemp("recipes")
    write_words(folder / "text", words=300)
    corpus = {"corpus": f"dir:{folder / 'text'}"}

    def recipe(title: str) -> Recipe:
        data: dict[str, Any] = {
            "name": "devices",
            "calibration": corpus | {"sequences": 4, "length": 32},
            "evaluation": corpus | {"sequences": 2, "prompt_tokens": 24, "continuation_tokens": 6},
        }
        sections = dict(SECTIONS[title])
        data["model"] = {"source": f"hf:{tiny_dir(sections.pop('model', 'Qwen3ForCausalLM'))}"}
        data["calibration"] |= sections.pop("calibration", {})
        (folder / "r.yaml").write_text(yaml.safe_dump(data | sections))
        return Recipe.load(folder / "r.yaml")

    return recipe


@pytest.fixture(scope="module")
def on_cpu(
    tmp_path_factory: pytest.TempPathFactory, recipe_of: Callable[[str], Recipe]
) -> Callable[[str], tuple[dict[str, str], list[str]]]:
    """Digests of that recipe's bundle, built here at once, and what was said meanwhile."""

    @functools.cache
    def built(title: str) -> tuple[dict[str, str], list[str]]:
        folder, lines = tmp_path_factory.mktemp("cpu"), list[str]()
        return digests(build(recipe_of(title), folder / "b", Cache(folder / "cache"), lines.append)), lines

    return built


class Stopped(BaseException):
    pass


def digests(bundle: Bundle) -> dict[str, str]:
    weights = (path for stage in STAGES for path in sorted((bundle.path / stage).glob("*.safetensors")))
    files = {f"{path.parent.name}/{path.name}": hashlib.sha256(path.read_bytes()).hexdigest() for path in weights}
    return files | {"plan": bundle.plan.digest}


@pytest.mark.parametrize("title", SECTIONS)
def test_a_build_on_a_gpu_is_the_cpus(
    title: str, tmp_path: Path, recipe_of: Callable[[str], Recipe], on_cpu: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    # transformers multiplies experts in a kernel of that GPU's, which a CPU has too
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    compute = BOTH if "effects" in title else FIRST
    with PretendedDevices():
        bundle = build(recipe_of(title), tmp_path / "gpu", Cache(tmp_path / "b"), compute=compute)
    assert digests(bundle) == on_cpu(title)[0]


@pytest.mark.parametrize("title", SECTIONS)
def test_a_build_that_is_stopped_goes_on_on_other_devices(
    title: str, tmp_path: Path, recipe_of: Callable[[str], Recipe], on_cpu: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In turns here, on GPUs and with fewer blocks in memory, a part each, and a step of training: to the same bits.

    No step of training is done again but the one that was stopped.
    """
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("pdtrim_deploy.pruning.healing.state._EVERY_S", 0.0)
    monkeypatch.setattr("pdtrim_deploy.pruning.healing.state._SHARE", 0)
    # The pretence ends where gradients are computed, in which streamed blocks are run again.
    places = [place for place in PLACES if "LoRA" not in title or place != FIRST.with_blocks(1)]
    recipe, (whole, lines) = recipe_of(title), on_cpu(title)
    order = list(dict.fromkeys(_without_figures(line) for line in lines if not line.startswith(QUICK)))
    stops, bundle, steps = list[int](), None, Counter[str]()

    def note(line: str) -> None:
        at = order.index(text) if (text := _without_figures(line)) in order else -1
        steps.update([text] * _of_training(text))
        last = stops[-1] if stops else 0
        if at > last and (at >= last + len(order) // PARTS or ": step " in text):
            stops.append(at)
            raise Stopped

    while bundle is None:
        compute = places[len(stops) % len(places)]
        with PretendedDevices() if compute.on_gpu else nullcontext(), suppress(Stopped):
            bundle = build(recipe, tmp_path / "b", Cache(tmp_path / "b cache"), note, compute=compute)
    assert len(stops) >= PARTS - 2
    assert digests(bundle) == whole
    undisturbed = Counter(filter(_of_training, map(_without_figures, lines)))
    assert bool(undisturbed) == any(name.endswith("_steps") for name in SECTIONS[title].get("healing", {}))
    assert steps == undisturbed + Counter(filter(_of_training, (order[at] for at in stops)))
    assert {*undisturbed} <= {order[at] for at in stops}, "each step was stopped once"


def _of_training(line: str) -> bool:
    return line.startswith("healing ") and ": step " in line


def _without_figures(line: str) -> str:
    return line.partition(", loss")[0]


def test_judging_on_a_gpu_is_the_cpus(tmp_path: Path, recipe_of: Callable[[str], Recipe]) -> None:
    cache = Cache(tmp_path / "c")
    bundle = build(recipe_of("search, effects and offsets"), tmp_path / "b", cache)
    known = [judged(bundle, cache, ON_CPU) for judged in (_quality, _tasks, _fidelity)]
    with PretendedDevices():
        assert [judged(bundle, cache, BOTH) for judged in (_quality, _tasks, _fidelity)] == known


def _quality(bundle: Bundle, cache: Cache, compute: Compute) -> Any:
    quality = judge_bundle(bundle, cache, {}, compute=compute)
    assert quality.device == compute.names
    return quality.model_copy(update={"device": None})


def _tasks(bundle: Bundle, cache: Cache, compute: Compute) -> Any:
    report = judge_tasks(bundle, ["agreement"], cache, {}, size=1, compute=compute)
    return report.model_copy(update={"device": None})


def _fidelity(bundle: Bundle, cache: Cache, compute: Compute) -> FidelityResult:
    """Of answers that no pair gave: what counts is how the oracle scores them."""
    models = (load_to_compute(stage, bundle.stage_dir(stage), "float32", print, compute) for stage in STAGES)
    oracle = PDOracle(*models, bundle.plan, KeyOffsets.read(bundle.prefill_dir, bundle.plan))
    prompts = (tuple(range(40, 40 + length)) for length in (9, 140))
    return judge(oracle, [(Group("g", "in turn", ()), Served(prompt, (7, 8), (-5.0, -6.0), 0)) for prompt in prompts])


def test_blocks_are_spread_and_the_host_holds_no_weight(
    tiny_dir: Callable[[str], Path], recipe_of: Callable[[str], Recipe]
) -> None:
    from pdtrim_deploy.models.checkpoint import read_checkpoint

    with PretendedDevices():
        model = load_on(read_checkpoint(tiny_dir("LlamaForCausalLM")), BOTH)
        hidden, span = Blockwise(model).embed(torch.arange(3, 9)[None])
        outputs = [Blockwise(model).block(layer, hidden, span) for layer in (0, 5)]
    kinds = [{type(weight) for weight in layer.parameters()} for layer in model.model.layers]
    assert kinds == [{OnFirst}] * 3 + [{OnSecond}] * 3
    assert {device_of(weight) for weight in model.parameters()} & {HOST} == set()
    assert [type(output) for output in outputs] == [OnFirst, OnSecond]


def test_the_pretended_devices_refuse_what_cuda_does() -> None:
    with PretendedDevices():
        there, other, here = torch.zeros(4, 3, device="cuda:0"), torch.ones(3, device="cuda:1"), torch.ones(4, 3)
        assert str(there.device) == "cuda:0"
        for across in (
            lambda: there + here,
            lambda: there + other,
            lambda: torch.nn.functional.linear(here, there),
            lambda: here.add_(there.sum()),
            lambda: torch.cat([there, here]),
            lambda: there.index_copy_(0, torch.arange(2), there[:2]),
            lambda: here[torch.arange(2).to("cuda:0")],
        ):
            with pytest.raises(RuntimeError, match=r"cuda|host"):
                across()
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
        there[:2].copy_(here[:2])
        assert torch.equal((there * 2).cpu(), torch.tensor([[2.0] * 3] * 2 + [[0.0] * 3] * 2))
        assert there.to("cuda:1").device.index == 1
