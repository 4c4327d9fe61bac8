"""DP attention on decode: groups of ranks divide requests among each other, ranks of a group the heads.

Genuine prefill and decode sides over TCP (rankpairs.py); no worker computes, so this needs no SGLang that can do so.
"""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("sglang", reason="needs the serve environment")
from pdtrim_sglang.manager import PDTrimKVManager
from pdtrim_sglang.messages import parse
from pdtrim_sglang.patches import loading
from pdtrim_sglang.requirements import dp_attention
from rankpairs import AUX, HEADS, PAGE, PLAN, SLOTS, TOKENS, World
from sglang.srt.disaggregation.base.conn import KVPoll
from sglang.srt.layers.dp_attention import compute_dp_attention_world_info
from sglang.srt.layers.radix_attention import RadixAttention

from pdtrim_deploy.plan.heads import held_heads

# ranks of prefill, groups of decode, ranks of a group; the last holds two copies of each head
LAYOUTS = [(1, 2, 1), (2, 2, 1), (4, 2, 2), (1, 2, 2), (2, 4, 1), (1, 2, 8)]


@pytest.fixture
def world(monkeypatch):
    worlds = []

    def make(prefill, groups, ranks):
        torch.manual_seed(0)
        worlds.append(World(monkeypatch, prefill, ranks, groups=groups))
        return worlds[-1]

    yield make
    for opened in worlds:
        opened.close()


def prompts(pair):
    """Pages of two prompts in prefill's pool."""
    others = [page for page in range(1, SLOTS // PAGE) if page not in pair.here.tolist()]
    return pair.here, torch.tensor(others[: len(pair.here)])


@pytest.mark.parametrize(("prefill", "groups", "ranks"), LAYOUTS)
def test_each_groups_pool_has_its_own_requests_rows_and_no_others(world, prefill, groups, ranks):
    """Two requests at once, in the first group and in the last; SGLang gives both the same pages."""
    expected = []
    for pages in prompts(world(1, 1, 1)):
        alone = world(1, 1, 1)
        alone.open()
        alone.send([0, TOKENS], here=pages)
        assert set(alone.wait(alone.decode)) == {KVPoll.Success}
        expected.append(alone.decode[0].pool)
    assert not torch.equal(expected[0].keys[0], expected[1].keys[0])

    pair, requests = world(prefill, groups, ranks), ((1, 0), (2, groups - 1))
    for room, group in requests:
        pair.open(room=room, group=group)
    for (room, _), pages in zip(requests, prompts(pair), strict=True):
        pair.send([0, 12, 16, TOKENS], room=room, here=pages)
    for (room, group), pool in zip(requests, expected, strict=True):
        assert set(pair.wait(pair.prefill + pair.group(group), room=room)) == {KVPoll.Success}
        for rank in pair.group(group):
            held = rank.pool.heads
            for side in ("keys", "values"):
                for got, rows in zip(getattr(rank.pool, side), getattr(pool, side), strict=True):
                    assert torch.equal(got, rows[:, held.start : held.stop])
            assert rank.aux.read(0) == AUX
    for group in range(1, groups - 1):  # has no request
        assert not any(rows.any() for rank in pair.group(group) for rows in rank.pool.keys + rank.pool.values)
    sent = [count for each in pair.prefill for count in each.side.rooms._metrics.successes]
    copies = max(1, ranks // HEADS)
    assert sum(payload for payload, _ in sent) == 2 * copies * PLAN.payload_bytes(TOKENS)
    assert sum(dense for _, dense in sent) == 2 * copies * PLAN.dense_bytes(TOKENS)


def test_a_request_of_one_group_is_not_taken_for_anothers(world):
    pair = world(2, 2, 1)
    pair.open(group=0)
    pair.open(room=3, group=1)
    again = parse(pair.decode[1].side.room_message(1, TOKENS, 0, 1))
    pair.prefill[0].side._handle(again.frames())
    assert "two decode workers are rank 0 of 1 of this request" in pair.prefill[0].manager.reasons[1]
    pair.send([0, TOKENS], room=3)
    assert set(pair.wait(pair.group(1), room=3)) == {KVPoll.Success}


@pytest.mark.parametrize(("tp", "dp"), [(2, 2), (4, 2), (8, 8), (16, 2), (4, 1)])
def test_heads_are_divided_within_a_group(tp, dp):
    """By SGLang's own ranks: each group has every head as often as its ranks have copies, each rank its own port."""
    heads, places = {}, []
    for rank in range(tp):
        worker = object.__new__(PDTrimKVManager)
        worker.attn_tp_rank, worker.attn_tp_size, worker.attn_dp_rank, _ = compute_dp_attention_world_info(rank, tp, dp)
        worker.system_dp_rank = worker.attn_dp_rank  # as SGLang's DataParallelController counts them
        places.append(worker.worker_rank)
        heads.setdefault(worker.attn_dp_rank, []).extend(held_heads(HEADS, worker.attn_tp_size, worker.attn_tp_rank))
    assert places == list(range(tp))
    copies = max(1, tp // dp // HEADS)
    assert heads == {group: sorted(list(range(HEADS)) * copies) for group in range(dp)}


class Attentions(nn.Module):
    """Layers of a model in one rank, with so many queries' heads each."""

    def __init__(self, *heads):
        super().__init__()
        self.layers = nn.ModuleList(RadixAttention(count, 16, 1.0, 1, layer) for layer, count in enumerate(heads))


class Unregistered(nn.Module):
    """As SGLang's models/transformers.py keeps them: `modules()` has none."""

    def __init__(self, *heads):
        super().__init__()
        self.attention_instances = dict(enumerate(Attentions(*heads).layers))


@pytest.mark.parametrize(
    ("groups", "heads", "known"),
    [(1, (2, 2), True), (2, (4, 4), True), (2, (2, 2), False), (2, (4, 2), False), (4, (8, 8), True)],
)
@pytest.mark.parametrize("draft", [False, True], ids=["model", "draft model"])
def test_models_whose_attention_sums_over_other_requests_are_refused(monkeypatch, groups, heads, known, draft):
    """Of eight heads and four ranks: as Qwen3 divides them in SGLang, and as Llama does."""
    monkeypatch.setattr(
        dp_attention, "get_parallel", lambda: SimpleNamespace(attn_dp_size=groups, attn_tp_size=4 // groups)
    )
    model_config = SimpleNamespace(num_attention_heads=8)
    models = {Attentions(*heads): known, Unregistered(*heads): groups == 1}
    for model, passes in models.items():
        runner = SimpleNamespace(model=model, model_config=model_config, is_draft_worker=draft)
        sentence = f"0.5.23's {type(model).__name__} sums over ranks .* start without --attn-dp-size"
        sentence += ".* or without --speculative-algorithm$" if draft else ""
        with nullcontext() if passes else pytest.raises(RuntimeError, match=sentence):
            loading.check_dp_attention(None, runner)
