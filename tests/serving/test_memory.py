"""Memory of CPU workers: the fraction that yields the pool asked for, and the refusal of what does not fit."""

import json
from pathlib import Path

import pytest

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.serving import Cluster, ClusterSpec, ServeEnvironment, WorkerOptions, commands, memory

CONFIG = {
    "num_hidden_layers": 24, "hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14,
    "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
    "max_position_embeddings": 32768,
}  # fmt: skip
GIB = 1 << 30


@pytest.fixture
def model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"model_type": "qwen2"}))
    return tmp_path


def spec(model, prefill=1, decode=1, **options):
    worker_options = WorkerOptions(**{"device": "cpu", "dtype": "bfloat16"} | options)
    return ClusterSpec.on_loopback(model, model, prefill=prefill, decode=decode, options=worker_options, gpus=2)


def free(monkeypatch, size, nodes=1):
    monkeypatch.setattr(memory, "memory", lambda: (64 * GIB, int(size)))
    monkeypatch.setattr(memory, "numa_nodes", lambda: nodes)


def pool_bytes(fraction, before, taken, nodes):
    """SGLang 0.5.23's KVCacheConfigurator._profile_available_bytes on a CPU, in bytes."""
    return (before - taken) / nodes - before / nodes * (1 - fraction)


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("pairs", [1, 2])
@pytest.mark.parametrize("tokens", [512, 8192, 200_000])
@pytest.mark.parametrize("spare", [0, 5e9, 500e9])
def test_what_is_let_through_gets_the_pool_asked_for_and_what_is_not_would_not(
    model, monkeypatch, nodes, pairs, tokens, spare
):
    workers = spec(model, pairs, pairs, max_total_tokens=tokens).workers
    sizes = [memory.memory_of(worker) for worker in workers]
    needed = sum(size.total(nodes) for size in sizes)
    free(monkeypatch, needed + spare, nodes)
    memory.require_memory(workers)
    for worker, size in zip(workers, sizes, strict=True):
        taken = sum(other.program + other.weights + other.pool for other in sizes) - size.pool  # all others are up
        fraction = memory.static_fraction(worker)
        assert 0 < fraction < 1
        # the last to measure sees all others; what it computes must hold its own pool (float: 4 digits of `before`)
        assert pool_bytes(fraction, needed + spare, taken, nodes) >= size.pool - 1e-4 * (needed + spare) - 1
    free(monkeypatch, needed - 2, nodes)
    with pytest.raises(UserError, match="the workers take about"):
        memory.require_memory(workers)


def test_the_old_fraction_gave_no_pool_beside_other_programs(model):
    """3 of 10 GB free: weights and programs alone are beyond it."""
    size = memory.memory_of(spec(model).workers[0])
    assert pool_bytes(0.3, 10e9, 2 * (size.program + size.weights) + size.pool, 1) < 0


def test_the_sizes_are_the_models(model):
    prefill, decode = (memory.memory_of(worker) for worker in spec(model).workers)
    assert prefill.weights == pytest.approx(2 * 0.494e9, rel=0.01)
    assert prefill.pool == 8192 * 24 * 2 * 2 * 64 * 2
    assert prefill.activations > 2 * decode.activations
    assert memory.memory_of(spec(model, dtype="float32").workers[0]).weights == 2 * prefill.weights
    small = memory.memory_of(spec(model, chunked_prefill_size=512).workers[0])
    assert small.activations < prefill.activations / 3
    assert memory.memory_of(spec(Path("nowhere")).workers[0]) is None


def test_the_refusal_names_the_sizes_and_starts_nothing(model, monkeypatch, tmp_path):
    free(monkeypatch, 4e9)
    with pytest.raises(UserError) as refused, Cluster(spec(model), ServeEnvironment(Path("none")), tmp_path / "logs"):
        pass
    message = str(refused.value)
    assert "the workers take about 5." in message
    assert "4.0 GB are free (prefill-0 " in message
    assert "program 1.2 GB, weights 1.0 GB, KV pool 0.1 GB" in message
    assert "lower --max-total-tokens" in message
    assert not (tmp_path / "logs").exists()


def test_who_gives_a_fraction_is_not_refused_and_wins(model, monkeypatch):
    free(monkeypatch, 4e9)
    for arguments in (("--mem-fraction-static", "0.9"), ("--mem-fraction-static=0.9",)):
        workers = spec(model, extra_args=arguments).workers
        memory.require_memory(workers)
        assert commands.worker_command(Path("python"), workers[0])[-len(arguments) :] == list(arguments)
    memory.require_memory(spec(model, device="cuda").workers)


def test_an_fp8_pool_takes_half_of_a_bfloat16_one(model):
    wide, fp8 = (
        memory.memory_of(spec(model, max_total_tokens=4096, pool_dtype=pool).workers[0])
        for pool in ("native", "fp8_e4m3")
    )
    assert (fp8.pool, fp8.weights, fp8.activations) == (wide.pool / 2, wide.weights, wide.activations)
