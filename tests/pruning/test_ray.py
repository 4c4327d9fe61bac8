"""Candidates on two workers of a Ray of our own: the same answer, and nothing listens beyond this machine."""

from __future__ import annotations

import copy
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from searches import stages_of
from torch import nn

from pdtrim_deploy.bundle import REPORTS
from pdtrim_deploy.errors import UserError
from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.models.loading import load_model
from pdtrim_deploy.pipeline import build
from pdtrim_deploy.pruning import ray_evaluator
from pdtrim_deploy.pruning.ray_evaluator import EvaluatorFactory, Workers, cluster
from pdtrim_deploy.pruning.search import Settings
from pdtrim_deploy.pruning.teacher import Teacher
from pdtrim_deploy.recipe import Recipe

# Not imported here: how Ray binds is decided when it is.
pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra ray"),
]


class Copies:
    """Students for a test: the pair's first layer, its weights halved."""

    def __init__(self, model) -> None:
        self.model = model

    def layer(self, pair: tuple[int, int]) -> nn.Module:
        layer = copy.deepcopy(self.model.model.layers[pair[0]])
        layer.mlp.down_proj.weight.data *= 0.5
        return layer


@pytest.fixture(scope="module")
def workers(tiny_llama_dir: Path) -> Iterator[EvaluatorFactory]:
    """Two workers for all tests, each of which imports torch and transformers, and room for a third."""
    with cluster(Workers(3)):
        yield EvaluatorFactory(Workers(2), tiny_llama_dir)
    assert not up()


def test_kl_on_a_worker_is_kl_here_and_costs_as_much(tiny_llama_dir: Path, workers: EvaluatorFactory) -> None:
    model, ids = load_model(tiny_llama_dir), torch.randint(3, 250, (4, 40), generator=torch.Generator().manual_seed(1))
    more = {"teacher": Teacher.of(model, ids), "prompt_tokens": 24}
    alone, worker = stages_of(model, ids, 1, 2, **more), copy.copy(workers)
    worker._actors = workers._actors[:1]
    shared = stages_of(model, ids, 1, 2, evaluator_factory=worker, **more)
    for stage in ("prefill", "decode"):
        expected, result = getattr(alone, stage), getattr(shared, stage)
        assert result.removed == expected.removed
        assert result.loss == pytest.approx(expected.loss, abs=1e-6)
        assert result.cost.block_forwards == expected.cost.block_forwards


def test_a_build_with_workers(
    tiny_llama_dir: Path, tmp_path: Path, workers: EvaluatorFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text").mkdir()
    for n in range(8):
        (tmp_path / "text" / f"{n}.txt").write_text(f"{n} quick brown foxes jump over the lazy dog " * 60)
    data = {
        "name": "tiny",
        "model": {"source": f"hf:{tiny_llama_dir}"},
        "calibration": {"corpus": f"dir:{tmp_path / 'text'}", "sequences": 4, "length": 64},
        "pruning": {"method": "greedy", "prefill_blocks": 1, "decode_blocks": 3},
    }
    recipe, cache, open_to_others = Recipe.model_validate(data), Cache(tmp_path / "cache"), set()

    def standing(count: Workers, checkpoint: Path, dtype: str) -> EvaluatorFactory:
        assert (count, checkpoint, dtype) == (Workers(2), tiny_llama_dir.resolve(), "float32")
        return workers

    monkeypatch.setattr(ray_evaluator, "cluster", lambda _: nullcontext())
    monkeypatch.setattr(ray_evaluator, "EvaluatorFactory", standing)

    def note(line: str) -> None:
        assert up()
        open_to_others.update(beyond_loopback(descendants(os.getpid())))

    alone = build(recipe, tmp_path / "alone", cache)
    shared = build(recipe, tmp_path / "shared", cache, note, workers=Workers(2))
    assert shared.plan.digest == alone.plan.digest
    assert alone.plan.decode_layers != tuple(range(3))
    assert open_to_others == set()
    assert (shared.path / REPORTS / "pruning.json").exists()


def test_what_goes_wrong_on_a_worker_is_one_sentence(
    tiny_llama_dir: Path, tmp_path: Path, workers: EvaluatorFactory
) -> None:
    model, ids = load_model(tiny_llama_dir), torch.randint(3, 250, (4, 24))
    with pytest.raises(UserError, match=r"^2 workers with 1 GPU each .*has 0; lower --workers or --worker-gpus$"):
        EvaluatorFactory(Workers(2, gpus=1), tiny_llama_dir)
    with pytest.raises(UserError, match=f"^[^\n]*{tmp_path / 'gone'}[^\n]*$"):
        stages_of(model, ids, 0, 2, evaluator_factory=EvaluatorFactory(Workers(1), tmp_path / "gone"))


def test_two_workers_choose_what_one_process_chooses_and_may_die(
    tiny_llama_dir: Path, workers: EvaluatorFactory
) -> None:
    """The last test: it leaves one worker."""
    model, ids = load_model(tiny_llama_dir), torch.randint(3, 250, (6, 48), generator=torch.Generator().manual_seed(0))

    def choose(evaluator_factory=None):
        more = {"method": "anneal", "settings": Settings(seed=3, steps=12), "pairs": (1, 3), "students": Copies(model)}
        return stages_of(model, ids, 1, 3, evaluator_factory=evaluator_factory, **more)

    alone = choose()
    shared = choose(workers)
    for stage in ("prefill", "decode"):
        expected, result = getattr(alone, stage), getattr(shared, stage)
        assert (expected.removed, expected.distilled) == (result.removed, result.distilled)
        assert result.loss == pytest.approx(expected.loss, abs=1e-5)

    ray, (_, second) = sys.modules["ray"], workers._actors
    with pytest.raises(UserError, match=r"^a Ray worker died.*the search goes on where it was$"):
        stages_of(model, ids, 0, 2, evaluator_factory=workers, progress=lambda _: ray.kill(second))


def up() -> bool:
    """Whether Ray runs for this process."""
    return "ray" in sys.modules and sys.modules["ray"].is_initialized()


def descendants(pid: int) -> set[int]:
    """`pid` and all processes that come from it."""
    parents = {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            parents[int(entry)] = int(Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    pids, size = {pid}, 0
    while size != len(pids):
        size = len(pids)
        pids |= {child for child, parent in parents.items() if parent in pids}
    return pids


def beyond_loopback(pids: set[int]) -> set[str]:
    """Addresses, as /proc/net/tcp has them, on which these processes listen and which are not of this machine alone."""
    sockets = set()
    for pid in pids:
        try:
            sockets |= {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")}
        except OSError:
            continue
    addresses = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                address = fields[1].partition(":")[0]
                if not address.endswith("0100007F") and address != "00000000000000000000000001000000":
                    addresses.add(fields[1])
    return addresses
