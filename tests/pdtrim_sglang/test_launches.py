"""Whole chunks of the workers' own code, counted as `make bench-launches` counts them: on meta tensors."""

from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton comes with CUDA builds of torch: the serve environment has it")

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")


@pytest.mark.parametrize("whole", [32, 8])
def test_a_served_chunk_is_one_kernel_each_way(monkeypatch, whole):
    """Whatever rules cut its layers. Slots, payload and a new chunk's table are copied, and nothing waits for that."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import launches

    plan, offsets = launches.plan_of("k4v3", whole)
    launches.gpu._fault(launches.DEVICE)
    with launches.on_meta(triton=True):
        new, known = ([launches.counted(move) for move in launches.moves(plan, offsets, room)] for room in (1, 2))
    assert [counter.launches for counter in (*new, *known)] == [1] * 4
    assert [counter.copies for counter in new] == [3, 2]
    assert [counter.copies for counter in known] == [2, 1]
    assert [counter.syncs for counter in (*new, *known)] == [0] * 4
    assert [counter.kernels for counter in new] == [[launches.gpu.pack_runs], [launches.gpu.unpack_runs]]
