"""Blocks read ahead of use: which are, how many at a time, and that nothing computed changes in a bit."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pretended_devices import PretendedDevices

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.local.compute import Compute
from pdtrim_deploy.models.checkpoint import read_checkpoint
from pdtrim_deploy.models.footprint import fit_one_model
from pdtrim_deploy.models.loading import load_model
from pdtrim_deploy.models.prefetch import Prefetch
from pdtrim_deploy.models.streaming import stream_model
from pdtrim_deploy.models.surgery import keep_blocks

GPU = Compute(("cuda:0",))


class Reads:
    """Tensors that say which block they are of; counts how many reads run at a time, and where."""

    def __init__(self) -> None:
        self.blocks: list[int] = []
        self.threads: set[int] = set()
        self.running = self.most = 0
        self._lock = threading.Lock()

    def __call__(self, block: int) -> dict[str, torch.Tensor]:
        with self._lock:
            self.running += 1
            self.most = max(self.most, self.running)
            self.blocks.append(block)
            self.threads.add(threading.get_ident())
        tensors = {"weight": torch.full((1,), float(block))}
        with self._lock:
            self.running -= 1
        return tensors


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.integers(1, 3))
def test_whatever_order_blocks_are_used_in_each_is_itself(order: list[int], most: int) -> None:
    """As `Blocks` uses it: so many alive, one ahead, never two reads at a time."""
    reads = Reads()
    prefetch, alive = Prefetch(reads, 6), dict[int, dict[str, torch.Tensor]]()
    taken = 0
    for block in order:
        if block not in alive:
            while len(alive) >= most:
                del alive[next(iter(alive))]
            alive[block] = prefetch.take(block)
            taken += 1
        prefetch.begin(block, alive)
        assert float(alive[block]["weight"]) == block
    prefetch.take(99)  # waits for what is under way
    assert reads.most == 1
    assert len(reads.blocks) == taken + 1 + prefetch.unused


def test_the_second_pass_over_some_blocks_reads_all_of_them_ahead() -> None:
    reads = Reads()
    prefetch, here = Prefetch(reads, 8), threading.get_ident()
    for _ in range(2):
        for block in (0, 1, 4, 5):
            prefetch.take(block)
            prefetch.begin(block, ())
    assert prefetch.unused == 2, "2 behind 1, and 6 behind 5: in order, the first time"
    reads.threads.clear()
    for block in (0, 1, 4, 5):
        prefetch.take(block)
        prefetch.begin(block, ())
    prefetch.take(0)
    assert here not in reads.threads


def test_what_reading_raises_is_raised_where_the_block_is_used() -> None:
    def read(block: int) -> dict[str, torch.Tensor]:
        if block == 1:
            raise UserError("shard 1 is gone")
        return {}

    prefetch = Prefetch(read, 3)
    prefetch.take(0)
    prefetch.begin(0, ())
    with pytest.raises(UserError, match="shard 1 is gone"):
        prefetch.take(1)
    assert prefetch.take(2) == {}


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen3MoeForCausalLM"])
def test_a_streamed_model_that_reads_ahead_is_the_whole_one_to_the_bit(
    architecture: str, tiny_dir: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda *_: (0, 0))  # transformers asks, for experts
    checkpoint, ids = read_checkpoint(tiny_dir(architecture)), torch.arange(3, 27).view(2, 12)
    whole = load_model(checkpoint.path)
    for most in (1, 2):
        with PretendedDevices():
            model, blocks = stream_model(checkpoint, most, GPU)
            outs = [model(ids.to("cuda:0")).logits.cpu() for _ in range(2)]
            pruned = keep_blocks(model, (0, 2, 5))(ids.to("cuda:0")).logits.cpu()
        assert all(torch.equal(out, whole(ids).logits) for out in outs)
        assert torch.equal(pruned, keep_blocks(whole, (0, 2, 5))(ids).logits)
        assert len(blocks.alive) <= most
        assert blocks.reads_ahead
    model, blocks = stream_model(checkpoint, 1)
    assert not blocks.reads_ahead, "on a CPU the cores that would read are those that compute"


def test_one_more_block_is_priced_on_gpus_alone(tiny_dir: Callable[[str], Path]) -> None:
    from pdtrim_deploy.models.footprint import read_ahead
    from pdtrim_deploy.models.weights import ModelSizes

    config = read_checkpoint(tiny_dir("LlamaForCausalLM")).config
    block = 4 * ModelSizes.of(config).block
    assert (read_ahead(config, GPU), read_ahead(config, Compute())) == (block, 0)
    limited = [fit_one_model(config, 8, compute.within(10**12, None), "it") for compute in (GPU, Compute())]
    assert [compute.blocks_in_memory for compute in limited] == [None, None]
