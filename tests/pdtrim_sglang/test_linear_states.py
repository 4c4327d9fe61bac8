"""States of linear attention between genuine SGLang pools: MambaPool, HybridLinearKVPool, HybridReqToTokenPool."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("sglang", reason="needs the serve environment")

from decodeoptions import DECODE
from pdtrim_sglang.messages import parse
from pdtrim_sglang.packing import Chunk
from pdtrim_sglang.pairing import Ranks, rejection, unlike_state_ranks
from pdtrim_sglang.plan_source import check_fits
from pdtrim_sglang.pool import PoolView
from pdtrim_sglang.protocol import ChunkHeader, ProtocolError
from pdtrim_sglang.requirements import check_options, check_staging, check_state_pool, layers_unheard
from pdtrim_sglang.state_slots import StateSlots, state_slot
from rankpairs import AUX, CONFIG, PAGE, SLOTS, TOKENS, World
from sglang.srt.configs.mamba_utils import Mamba2CacheParams, Mamba2StateDType, Mamba2StateShape
from sglang.srt.disaggregation.base.conn import KVPoll
from sglang.srt.disaggregation.utils import setup_state_kv_args
from sglang.srt.mem_cache.memory_pool import HybridLinearKVPool, HybridReqToTokenPool, MambaPool

from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.models import resolve
from pdtrim_deploy.models.checkpoint import read_checkpoint
from pdtrim_deploy.models.loading import load_model
from pdtrim_deploy.models.oracle import PDOracle
from pdtrim_deploy.models.surgery import write_stage
from pdtrim_deploy.plan import KVSend, LinearStates, ModelShape, PDPlan

HEADS, DIM, KV_LAYERS, REQUESTS = 4, 64, (2, 5), 6
STATES = LinearStates(blocks=(0, 1, 3, 4), key_heads=4, key_dim=64, value_heads=8, value_dim=48, conv_columns=3)
SHAPE = ModelShape(
    architecture="X", fingerprint="f", num_blocks=6, num_kv_heads=HEADS, head_dim=DIM, kv_dtype="float32",
    states=STATES,
)  # fmt: skip
PLAN = PDPlan.dense(SHAPE).with_kv((KVSend(), KVSend(wire_dtype="int4")))


def cache_params(ranks: int = 1, conv: torch.dtype = torch.bfloat16) -> Mamba2CacheParams:
    """As SGLang's Qwen3NextConfig makes them."""
    keys, values = STATES.key_heads * STATES.key_dim, STATES.value_heads * STATES.value_dim
    shape = Mamba2StateShape.create(
        tp_world_size=ranks, intermediate_size=values, n_groups=STATES.key_heads, num_heads=STATES.value_heads,
        head_dim=STATES.value_dim, state_size=STATES.key_dim, conv_kernel=STATES.conv_columns + 1,
        conv_shard_groups=[keys, keys, values],
    )  # fmt: skip
    dtype = Mamba2StateDType(conv=conv, temporal=torch.float32)
    return Mamba2CacheParams(shape=shape, layers=list(STATES.blocks), dtype=dtype)


def requests_pool(ranks: int = 1, **options: Any) -> HybridReqToTokenPool:
    """A worker's table of requests, which has the slots of states."""
    return HybridReqToTokenPool(
        size=REQUESTS, mamba_size=REQUESTS, mamba_spec_state_size=REQUESTS, max_context_len=64, device="cpu",
        enable_memory_saver=False, cache_params=cache_params(ranks, **options), mamba_layer_ids=list(STATES.blocks),
        enable_mamba_extra_buffer=False,
    )  # fmt: skip


def kv_pool(states: MambaPool, ranks: int = 1) -> HybridLinearKVPool:
    return HybridLinearKVPool(
        size=SLOTS - PAGE, dtype=torch.float32, page_size=PAGE, head_num=HEADS // ranks, head_dim=DIM,
        full_attention_layer_ids=list(KV_LAYERS), device="cpu", mamba_pool=states,
    )  # fmt: skip


def fill(pool: HybridLinearKVPool, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    cache, full = pool.mamba_pool.mamba_cache, pool.full_kv_pool
    for tensor in (*cache.conv, cache.temporal, *full.k_buffer, *full.v_buffer):
        tensor.copy_(torch.randn(tensor.shape, generator=generator))


def test_a_rank_of_sglangs_pool_is_what_the_plan_says():
    """Bytes too: SGLang's own sum of a request's."""
    for ranks in (1, 2, 4):
        table = requests_pool(ranks)
        pool = kv_pool(table.mamba_pool, ranks)
        view = PoolView.of(pool)
        check_fits(PLAN, "decode", view.buffers, ranks)
        check_state_pool(PLAN, view.states, ranks)
        assert cache_params(ranks).mamba_cache_per_req == STATES.bytes // ranks
        assert view.states.layers * view.states.layer_bytes == STATES.bytes // ranks
        assert (view.tokens, view.kv_heads, len(view.keys)) == (SLOTS, HEADS // ranks, 2)


def test_what_travels_is_what_sglangs_own_transfer_would_send():
    """The same bytes of each tensor that SGLang registers for RDMA, by its own list of them."""
    table = requests_pool()
    pool = kv_pool(table.mamba_pool)
    fill(pool)
    args = SimpleNamespace()
    setup_state_kv_args(args, pool, None, None, table)
    assert [kind.value for kind in args.state_types] == ["mamba"]
    slots, slot = StateSlots.of(pool.mamba_pool), 3
    assert sum(args.state_item_lens[0]) == STATES.bytes == slots.layers * slots.layer_bytes
    packed = slots.pack(range(slots.layers), slot)
    expected = [
        state[slot].reshape(-1).view(torch.uint8) for _, state, _, _ in pool.mamba_pool._iter_transfer_state_entries()
    ]
    assert sorted(bytes(part.numpy()) for part in expected) == sorted(_by_layer(slots, packed))


def _by_layer(slots: StateSlots, packed: torch.Tensor) -> list[bytes]:
    """Bytes of each layer's two tensors in what was packed of all layers."""
    recurrent = packed[: slots.recurrent[:, 0].nbytes]
    conv = packed[len(recurrent) :]
    return [bytes(part.numpy()) for side in (recurrent, conv) for part in side.chunk(slots.layers)]


@pytest.mark.parametrize("most", [1, 2, 3, 4])
def test_states_come_over_in_any_number_of_parts_and_into_no_other_slot(most):
    source, target = kv_pool(requests_pool().mamba_pool), kv_pool(requests_pool().mamba_pool)
    fill(source)
    slots, there = StateSlots.of(source.mamba_pool), StateSlots.of(target.mamba_pool)
    parts = list(slots.parts(most * slots.layer_bytes + 5))
    assert [layer for part in parts for layer in part] == [0, 1, 2, 3]
    assert max(map(len, parts)) == most
    for part in parts:
        packed = slots.pack(part, 2)
        assert len(packed) == len(part) * slots.layer_bytes
        there.unpack(part, 5, packed)
    for here, arrived in ((slots.conv, there.conv), (slots.recurrent, there.recurrent)):
        assert torch.equal(here[:, 2], arrived[:, 5])
        assert not arrived[:, [0, 1, 2, 3, 4, 6]].any()


def test_a_slot_is_read_from_what_sglang_hands_over():
    """By its own table of requests, as `prefill.py` and `decode.py` ask it; of windows it hands over pages."""
    table = requests_pool()
    reqs = [SimpleNamespace(kv=SimpleNamespace(
        req_pool_idx=None, holds_kv=False, holds_mamba=False, mamba_pool_idx=None, mamba_needs_clear=False,
    )) for _ in range(2)]  # fmt: skip
    rows = table.alloc(reqs)
    for row, req in zip(rows, reqs, strict=True):
        payload = [table.translate_mamba_indices(table.req_index_to_mamba_index_mapping[row]).cpu().numpy()]
        assert state_slot([payload]) == int(req.kv.mamba_pool_idx) > 0
    assert state_slot(None) is state_slot([]) is state_slot([torch.arange(3).numpy()]) is None


class StateWorld(World):
    """As rankpairs.World, of genuine pools of SGLang on every rank; request 1 has slot 4 in prefill, 2 in decode."""

    HERE, THERE = 4, 2

    def pool(self, ranks, rank, rows):
        pool = kv_pool(requests_pool(ranks).mamba_pool, ranks)
        if any(side.any() for side in rows[0]):
            fill(pool, rank)
        heads = HEADS // ranks
        return replace(PoolView.of(pool), first_head=rank * heads)

    def open(self, room=1, slot: int | None = THERE):
        for rank, decode in enumerate(self.decode):
            decode.manager.request_status[room] = KVPoll.WaitingForInput
            decode.side.open_room(
                room, TOKENS, 0, self.there.numpy(), 0, prefill_ranks=self.prefill_ranks, state_slot=slot
            )
            side = self.prefill[rank].side
            side._handle(decode.side.register_message())
            side._handle(decode.side.room_message(room, TOKENS, 0, 1))

    def send(self, cuts, room=1, slot: int | None = HERE):
        for prefill in self.prefill:
            prefill.side.sender_opened(room)
            for start, stop in itertools.pairwise(cuts):
                last = stop == TOKENS
                prefill.side.submit(
                    Chunk(
                        room, self.here[start // PAGE :].numpy(), start, TOKENS, start, stop, last, 0,
                        state_slot=slot if last else None,
                    )
                )  # fmt: skip


def world(monkeypatch, ranks=1, config=CONFIG):
    torch.manual_seed(0)
    return StateWorld(monkeypatch, ranks, ranks, plan=PLAN, config=config)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("staging_bytes", [1 << 20, 110_000])
@pytest.mark.parametrize("cuts", [[0, TOKENS], [0, 12, TOKENS]])
def test_a_request_comes_over_with_its_rows_and_its_states(ranks, staging_bytes, cuts, monkeypatch):
    """Over sockets, chunked, with staging buffers that hold a part of the states; bytes are the plan's."""
    pair = world(monkeypatch, ranks, replace(CONFIG, staging_bytes=staging_bytes))
    try:
        pair.open()
        pair.send(cuts)
        assert set(pair.wait(pair.prefill + pair.decode)) == {KVPoll.Success}, pair.decode[0].manager.reasons
        for here, there in zip(pair.prefill, pair.decode, strict=True):
            assert there.aux.read(0) == AUX
            for side in ("conv", "recurrent"):
                sent, arrived = getattr(here.pool.states, side), getattr(there.pool.states, side)
                assert torch.equal(sent[:, pair.HERE], arrived[:, pair.THERE])
                assert not arrived[:, [0, 1, 3, 4, 5, 6]].any()
            slots = there.pool.slots(pair.there.numpy(), TOKENS)
            source = here.pool.slots(pair.here.numpy(), TOKENS)
            assert torch.equal(there.pool.keys[0][slots], here.pool.keys[0][source])
            assert there.pool.values[1][slots].any()
        counted = [success for each in pair.prefill for success in each.side.rooms._metrics.successes]
        assert sum(payload for payload, _ in counted) == PLAN.payload_bytes(TOKENS)
        assert sum(dense for _, dense in counted) == PLAN.dense_bytes(TOKENS)
    finally:
        pair.close()


def test_a_request_without_a_slot_fails_alone(monkeypatch):
    pair = world(monkeypatch)
    try:
        pair.open(1, slot=None)
        pair.send([0, TOKENS], 1)
        assert set(pair.wait(pair.decode, 1)) == {KVPoll.Failed}
        assert "decode has no slot for this request's states" in pair.decode[0].manager.reasons[1]
        pair.open(2)
        pair.send([0, TOKENS], 2)
        assert set(pair.wait(pair.decode, 2)) == {KVPoll.Success}
    finally:
        pair.close()


def test_a_request_whose_prefill_names_no_slot_fails_alone(monkeypatch):
    """With its reason on both sides, and before the packer: the next request comes over."""
    pair = world(monkeypatch)
    try:
        pair.open(1)
        pair.send([0, TOKENS], 1, slot=None)
        assert set(pair.wait(pair.prefill, 1)) == {KVPoll.Failed}
        assert pair.prefill[0].manager.reasons[1] == "prefill has no slot for this request's states"
        pair.open(2)
        pair.send([0, TOKENS], 2)
        assert set(pair.wait(pair.prefill + pair.decode, 2)) == {KVPoll.Success}
    finally:
        pair.close()


def header(**changes):
    fields = {
        "digest": bytes.fromhex(PLAN.digest), "room": 1, "rank": 0, "prompt_tokens": TOKENS, "start": TOKENS,
        "stop": TOKENS, "aux_bytes": 0, "payload_bytes": 0, "last": False, "heads": range(HEADS), "states": range(2),
    }  # fmt: skip
    return ChunkHeader(**fields | changes)


def test_a_header_of_states_is_read_back_and_a_senseless_one_refused():
    sent = header()
    assert ChunkHeader.decode(sent.encode([])) == sent
    assert ChunkHeader.decode(header(states=None, layers=range(1, 2)).encode([])).layers == range(1, 2)
    with pytest.raises(ProtocolError, match="states of 2 layers at token 3 of a prompt of 22 tokens"):
        ChunkHeader.decode(header(start=3).encode([]))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "the last chunk came before rows of other layers|chunk begins at token 22, expected 0"),
        ({"states": range(3, 9)}, "states of layers 3 to 8, this worker has 4"),
        ({"payload_bytes": 3}, r"chunk of 3 \+ 0 bytes"),
    ],
)
def test_states_that_are_not_the_next_are_refused(changes, words, monkeypatch):
    pair = world(monkeypatch)
    try:
        pair.open()
        side, size = pair.decode[0].side, pair.decode[0].pool.states.layer_bytes
        wrong = header(**{"payload_bytes": 2 * size} | changes)
        try:
            side.admit(wrong)
            reason = side.deliver(wrong, torch.zeros(2 * size, dtype=torch.uint8), memoryview(b"")).reason
        except ProtocolError as error:
            reason = str(error)
        assert re.search(words, reason), reason
        assert not pair.decode[0].pool.states.recurrent.any()
    finally:
        pair.close()


def test_states_come_in_their_order(monkeypatch):
    pair = world(monkeypatch)
    try:
        pair.open()
        pair.prefill[0].side.sender_opened(1)
        room, view = pair.decode[0].side._rooms[1], pair.decode[0].pool
        size, aux = view.states.layer_bytes, pair.decode[0].aux
        from pdtrim_sglang.layer_positions import LayerPositions

        room.positions[0] = positions = LayerPositions(2, 0)
        positions.advance(range(2), TOKENS)
        payload = torch.ones(2 * size, dtype=torch.uint8)

        def take(**changes):
            return room.take(PLAN, view, aux, header(**changes), payload, memoryview(b""))

        assert "states of layers 2 to 3, expected 0" in take(states=range(2, 4), last=True, aux_bytes=12)
        assert "last=True" in take(last=True, aux_bytes=12)
        assert take() == ""
        assert "states of layers 0 to 1, expected 2" in take()
        assert "an aux row of 0 bytes, expected 12" in take(states=range(2, 4), last=True)
        last = header(states=range(2, 4), last=True, aux_bytes=12)
        assert room.take(PLAN, view, aux, last, payload, memoryview(AUX)) == ""
    finally:
        pair.close()


def options(**changes):
    return SimpleNamespace(**DECODE | {"disaggregation_decode_enable_radix_cache": False} | changes)


def test_a_bundle_with_states_is_served_and_what_would_be_wrong_is_refused():
    mamba = SimpleNamespace(state_types=[SimpleNamespace(value="mamba")], page_size=1)
    check_options(options(), mamba, PLAN, False)
    with pytest.raises(RuntimeError, match=r"would go on from states.*--disaggregation-decode-enable-radix-cache"):
        check_options(options(disaggregation_decode_enable_radix_cache=True), mamba, PLAN, False)
    with pytest.raises(RuntimeError, match="cuts layers of a model with linear attention"):
        check_options(options(), mamba, PLAN.with_kv((KVSend(mode="sparse", n_last=4),) * 2), False)
    with pytest.raises(RuntimeError, match=r"goes back to earlier states of linear attention.*--speculative-algorithm"):
        check_options(options(speculative_algorithm="NGRAM"), mamba, PLAN, False)
    plain = PDPlan.dense(SHAPE.model_copy(update={"states": None}))
    for plan in (None, plain):
        with pytest.raises(RuntimeError, match=r"sent of a bundle of a known family alone.*\(mamba\)"):
            check_options(options(), mamba, plan, False)
    index = SimpleNamespace(state_types=[SimpleNamespace(value="dsa")], page_size=1)
    with pytest.raises(RuntimeError, match=r"an index.*\(dsa\)"):
        check_options(options(), index, PLAN, False)


def test_another_pool_than_the_plans_is_refused():
    slots = StateSlots.of(requests_pool().mamba_pool)
    check_state_pool(PLAN, slots, 1)
    plain = PDPlan.dense(SHAPE.model_copy(update={"states": None}))
    check_state_pool(plain, None, 1)
    for plan, there, ranks, words in (
        (plain, slots, 1, "this model keeps states, and the plan has none"),
        (PLAN, None, 1, "this worker has no pool of them"),
        (PLAN, slots, 2, r"expects a convolution state of \(448, 3\), the pool has \(896, 3\)"),
        (PLAN, slots, 3, "cannot be divided among 3 ranks: start with a --tp-size that divides both"),
        (PLAN, StateSlots(slots.conv[:3], slots.recurrent[:3]), 1, "gives 4 layers a state, the loaded model has 3"),
        (PLAN, StateSlots(slots.conv.float(), slots.recurrent), 1, "start it with SGLANG_MAMBA_CONV_DTYPE bfloat16"),
        (PLAN, StateSlots(slots.conv, slots.recurrent.half()), 1, "start it with --mamba-ssm-dtype float32"),
    ):
        with pytest.raises(RuntimeError, match=words):
            check_state_pool(plan, there, ranks)


def test_states_are_sent_between_equal_numbers_of_ranks_and_hold_up_no_layers():
    assert unlike_state_ranks(2, 2) == ""
    sentence = "numbers alone: start both workers with one --tp-size (with DP attention divided by --attn-dp-size)"
    assert sentence in unlike_state_ranks(2, 1)
    assert "states leave behind all rows" in layers_unheard(SimpleNamespace(), SimpleNamespace(), PLAN)


def test_a_staging_buffer_holds_a_layers_state():
    view = PoolView.of(kv_pool(requests_pool().mamba_pool))
    check_staging(PLAN, view, 103_680)
    with pytest.raises(RuntimeError, match="hold no layer's state of this model: give 103680 at least"):
        check_staging(PLAN, view, 103_679)


def test_a_pool_with_other_states_beside_is_refused():
    pool = requests_pool().mamba_pool
    pool.enable_linear_replayssm = True
    with pytest.raises(RuntimeError, match="start without --enable-linear-replayssm"):
        StateSlots.of(pool)


@pytest.mark.parametrize("architecture", ["Qwen3NextForCausalLM", "Qwen3_5ForCausalLM"])
def test_sglang_reads_of_a_stage_what_the_plan_says(architecture, tiny_dir, tmp_path, monkeypatch):
    """Kinds of blocks, rotation, and the pool of states, by its own config class."""
    from sglang.srt.configs import qwen3_next
    from sglang.srt.utils.hf_transformers import get_config

    cache = Cache(tmp_path / "cache")
    write_stage(resolve(f"hf:{tiny_dir(architecture)}", cache), tmp_path / "s", range(6), "bfloat16", {})
    shape = read_checkpoint(tmp_path / "s").shape()
    monkeypatch.setattr(qwen3_next, "get_parallel", lambda: SimpleNamespace(attn_tp_size=1))
    monkeypatch.setattr(qwen3_next, "linear_attn_tp_size", lambda: 1)
    config = get_config(str(tmp_path / "s"), trust_remote_code=False)
    assert isinstance(config, qwen3_next.Qwen3NextConfig)
    assert tuple(config.full_attention_layer_ids) == shape.kv_blocks
    assert (config.rope_theta, config.partial_rotary_factor) == (100.0, 0.5)
    params = config.mamba2_cache_params
    assert tuple(params.layers) == shape.states.blocks
    pool = MambaPool(size=2, spec_state_size=2, cache_params=params, mamba_layer_ids=params.layers, device="cpu")
    check_state_pool(PDPlan.dense(shape), StateSlots.of(pool), 1)


@pytest.mark.parametrize("architecture", ["Qwen3NextForCausalLM", "Qwen3_5ForCausalLM"])
def test_the_oracle_is_transformers_own_forward_pass_in_this_environment_too(architecture, tiny_dir):
    folder = tiny_dir(architecture)
    model, shape = load_model(folder), read_checkpoint(folder).shape()
    oracle, ids = PDOracle(model, model, PDPlan.dense(shape)), torch.arange(3, 3 + TOKENS)[None]
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits.log_softmax(-1)
    expected = logits[:, :-1].gather(2, ids[:, 1:, None])[0, :, 0]
    for prompt in (1, 3, TOKENS - 6):
        scores = oracle.logprobs(ids[0, :prompt], ids[0, prompt:])
        torch.testing.assert_close(scores, expected[prompt - 1 :], atol=1e-3, rtol=0)
    greedy = oracle.greedy(ids[0, :9], 5)
    with torch.no_grad():
        again = model(torch.cat((ids[0, :9], greedy))[None], use_cache=False).logits[0, 8:-1].argmax(-1)
    assert torch.equal(greedy, again)


def test_a_decode_worker_with_another_number_of_ranks_is_refused(monkeypatch):
    pair = world(monkeypatch, 2)
    try:
        register, aux = parse(pair.decode[0].side.register_message()), pair.decode[0].aux
        assert rejection(register, PLAN, Ranks(2, 0, HEADS), aux) == ""
        reason = rejection(register.model_copy(update={"tp_size": 1}), PLAN, Ranks(2, 0, HEADS), aux)
        assert "prefill has 2 attention ranks and decode 1, and states of linear attention are sent" in reason
    finally:
        pair.close()
