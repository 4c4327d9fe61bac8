"""Which rows of a batch are of the tails of their prompts, and which layers and attention backend have them."""

import weakref
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("sglang", reason="needs the serve environment")
from pdtrim_sglang.prompt_tail.rows import part_of, tail_lengths
from pdtrim_sglang.prompt_tail.tails import PromptTails
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
from tailbatches import SLOTS, Part, extend_batch, slots_of

TABLE = slots_of(8)
OF_REQUESTS = (
    "batch_size", "rids", "req_pool_indices", "req_pool_indices_cpu", "seq_lens", "seq_lens_cpu", "orig_seq_lens",
    "seq_lens_sum", "extend_seq_lens", "extend_seq_lens_cpu", "extend_prefix_lens", "extend_prefix_lens_cpu",
    "extend_start_loc",
)  # fmt: skip
OF_TOKENS = ("input_ids", "positions", "out_cache_loc", "extend_num_tokens", "global_num_token_non_padded_cpu")


@st.composite
def batches(draw):
    """Chunks of up to five prompts, their lengths where they are known, and a tail."""
    tail, prompts, parts = draw(st.integers(1, 12)), {}, []
    for row in draw(st.lists(st.integers(0, 7), min_size=1, max_size=5, unique=True)):
        prompt = draw(st.integers(1, SLOTS))
        prefix = draw(st.integers(0, prompt - 1))
        parts.append(Part(f"r{row}", row, prefix, draw(st.integers(1, prompt - prefix))))
        if draw(st.booleans()):
            prompts[f"r{row}"] = prompt
    return parts, prompts, tail


def in_tail(part, prompts, tail):
    """Of each token of the chunk, by its position in the prompt."""
    known = part.rid in prompts
    return [known and position >= prompts[part.rid] - tail for position in range(part.prefix, part.stop)]


def lengths_of(parts, prompts, tail):
    return tail_lengths(*zip(*[(part.rid, part.prefix, part.extend) for part in parts], strict=True), prompts, tail)


@given(batches())
def test_a_token_is_of_the_tail_by_its_position_in_the_prompt(drawn):
    parts, prompts, tail = drawn
    for part, length in zip(parts, lengths_of(parts, prompts, tail), strict=True):
        flags = in_tail(part, prompts, tail)
        assert flags == [False] * (part.extend - length) + [True] * length


@given(st.integers(1, 40), st.integers(1, 50), st.data())
def test_chunks_of_any_division_have_the_same_tail(prompt, tail, data):
    cuts = data.draw(st.sets(st.integers(1, max(1, prompt - 1)).filter(lambda cut: cut < prompt)))
    ends = [*sorted(cuts), prompt]
    chunks = zip([0, *ends], ends, strict=False)
    lengths = [tail_lengths(["a"], [start], [stop - start], {"a": prompt}, tail)[0] for start, stop in chunks]
    assert sum(lengths) == min(prompt, tail)


@settings(deadline=None)
@given(batches())
def test_the_view_is_the_batch_that_sglang_would_make_of_these_tokens(drawn):
    """Bodies: compared with a batch whose chunks end where the tails begin; tails: with what is left."""
    parts, prompts, tail = drawn
    batch = extend_batch(parts, TABLE)
    before = {field.name: getattr(batch, field.name) for field in fields(batch)}
    lengths, flags = lengths_of(parts, prompts, tail), [f for part in parts for f in in_tail(part, prompts, tail)]
    bodies = [part.extend - length for part, length in zip(parts, lengths, strict=True)]
    for firsts, counts, kind in (([0] * len(parts), bodies, False), (bodies, lengths, True)):
        if not any(counts):
            continue
        view = part_of(batch, firsts, counts)
        assert view.rows.dtype == torch.int64
        assert view.rows.tolist() == [row for row, flag in enumerate(flags) if flag is kind]
        cut = [(part, first, n) for part, first, n in zip(parts, firsts, counts, strict=True) if n]
        expected = extend_batch([part._replace(prefix=part.prefix + first, extend=n) for part, first, n in cut], TABLE)
        for name in OF_REQUESTS + OF_TOKENS:
            values, expected_values = getattr(view.batch, name), getattr(expected, name)
            if isinstance(expected_values, torch.Tensor):
                assert values.dtype == expected_values.dtype, name
                assert torch.equal(values, expected_values), name
            else:
                assert values == expected_values, name
    assert all(getattr(batch, name) is value for name, value in before.items()), "the batch itself has changed"


def test_a_view_has_a_residual_of_its_own_and_no_count_of_rows_that_are_padding():
    batch = extend_batch([Part("a", 0, 0, 6)], TABLE)
    batch.residual_stream, batch.num_token_non_padded = object(), torch.tensor(6)
    batch.global_num_token_non_padded = torch.tensor(6)
    view = part_of(batch, [4], [2]).batch
    assert (view.residual_stream, view.num_token_non_padded, view.global_num_token_non_padded) == (None, None, None)
    assert batch.residual_stream is not None


def test_what_sglang_leaves_out_of_a_batch_is_left_out_of_the_view():
    batch = extend_batch([Part("a", 0, 0, 6)], TABLE)
    batch.seq_lens_cpu = batch.req_pool_indices_cpu = batch.orig_seq_lens = None
    view = part_of(batch, [0], [2]).batch
    assert (view.seq_lens_cpu, view.req_pool_indices_cpu, view.orig_seq_lens) == (None, None, None)


class Backend:
    """Notes the batches that it has metadata of, and those that it attends for."""

    def __init__(self):
        self.planned, self.attended = [], []

    def init_forward_metadata(self, batch):
        self.planned.append(batch)

    def forward(self, q, k, v, layer, batch, save_kv_cache=True):
        self.attended.append(batch)
        return self, save_kv_cache


class Layer:
    """Adds one to each row, and notes the batches that it runs."""

    def __init__(self):
        self.ran = []

    def forward(self, positions, hidden_states, forward_batch):
        assert len(positions) == len(hidden_states)
        self.ran.append(forward_batch)
        return hidden_states + 1


class Body:
    """Notes the batches that it writes K and V of."""

    def __init__(self):
        self.ran = []

    def input_layernorm(self, hidden):
        return hidden

    def self_attn(self, positions, hidden_states, forward_batch):
        assert torch.equal(hidden_states[:, 0], forward_batch.input_ids + 1.0)  # behind the first layer
        assert torch.equal(positions, forward_batch.positions)
        self.ran.append(forward_batch)


@pytest.fixture
def worker():
    """A runner that tails of 4 tokens follow, whose last two of three layers are KV-only for others.

    The request `a` has 10 tokens, and goes to room 1.
    """
    bound, first, second, layers, bodies = [], Backend(), Backend(), [Layer() for _ in range(3)], [Body(), Body()]
    runner = SimpleNamespace(
        attn_backend=first, _get_attention_backend=lambda: second,
        model=SimpleNamespace(model=SimpleNamespace(layers=layers)),
        kv_index_translator=SimpleNamespace(bind_own_plan=bound.append),
    )  # fmt: skip
    tails = PromptTails(4, 1, bodies)
    tails.follow(runner)
    tails.expect("a", 1, 10)
    return SimpleNamespace(tails=tails, first=first, second=second, bound=bound, layers=layers, bodies=bodies)


def attend(worker, batch):
    return worker.first.forward(None, None, None, None, batch, save_kv_cache=False)


def run(worker, batch):
    """As SGLang's runner; by their ids, tokens of which K and V were written alone, and that ran the last layers."""
    for module in (*worker.layers, *worker.bodies):
        module.ran.clear()
    worker.first.init_forward_metadata(batch)
    states = batch.input_ids[:, None].float()
    with forward_context(ForwardContext(attn_backend=worker.first), forward_batch=batch):
        for layer in worker.layers:
            states = layer.forward(batch.positions, states, batch)
    first, *last = worker.layers
    assert first.ran == [batch]
    alone, whole = (_tokens(modules) for modules in (worker.bodies, last))
    assert states[:, 0].tolist() == [token + (3 if token in whole else 1) for token in batch.input_ids.tolist()]
    return [alone, whole]


def _tokens(modules):
    """Of the batches that each of these has run."""
    each = [[token for part in module.ran for token in part.input_ids.tolist()] for module in modules]
    assert each[0] == each[1]
    return each[0]


def test_tails_have_metadata_of_their_own(worker):
    batch = extend_batch([Part("a", 0, 3, 7), Part("b", 1, 0, 5)], TABLE)
    assert run(worker, batch) == [[3, 4, 5, 1000, 1001, 1002, 1003, 1004], [6, 7, 8, 9]]
    (tail,) = worker.layers[-1].ran
    assert (worker.first.planned, worker.second.planned) == ([batch], [tail])
    assert worker.bound == [tail]
    assert attend(worker, batch) == (worker.first, False)
    assert attend(worker, tail) == (worker.second, False)

    later = extend_batch([Part("b", 1, 5, 2)], TABLE)
    assert run(worker, later) == [[1005, 1006], []]
    assert worker.bodies[-1].ran == [later]
    assert attend(worker, tail) == (worker.first, False), "no batch of a tail any more"


def test_where_all_rows_are_of_tails_the_batch_is_not_divided(worker):
    batch = extend_batch([Part("a", 0, 7, 3)], TABLE)
    assert run(worker, batch) == [[], [7, 8, 9]]
    assert worker.layers[-1].ran == [batch]
    assert (worker.first.planned, worker.second.planned, worker.bound) == ([batch], [], [])


def test_a_part_is_not_held_when_the_next_batch_comes(worker):
    run(worker, extend_batch([Part("a", 0, 3, 7)], TABLE))
    parts = [weakref.ref(modules[-1].ran[-1]) for modules in (worker.bodies, worker.layers)]
    for module in (*worker.layers, *worker.bodies):
        module.ran.clear()
    for backend in (worker.first, worker.second):
        backend.planned.clear()
    worker.bound.clear()
    assert all(part() is not None for part in parts)
    worker.first.init_forward_metadata(extend_batch([Part("b", 1, 0, 2)], TABLE))
    assert all(part() is None for part in parts)


@pytest.mark.parametrize("mode", [ForwardMode.DECODE, ForwardMode.IDLE])
def test_other_batches_run_the_model_as_it_is(worker, mode):
    batch = extend_batch([Part("a", 0, 3, 7)], TABLE, mode)
    assert run(worker, batch) == [[], [3, 4, 5, 6, 7, 8, 9]]
    assert (worker.first.planned, worker.second.planned) == ([batch], [])


def test_sglangs_dummy_batches_run_the_model_as_it_is(worker):
    batch = extend_batch([Part("a", 0, 3, 7)], TABLE)
    batch.rids = batch.extend_prefix_lens_cpu = batch.extend_seq_lens_cpu = None
    assert run(worker, batch) == [[], [3, 4, 5, 6, 7, 8, 9]]


def tail_of(worker, rid, extend=10):
    """Places in the prompt that run the tails' model."""
    return run(worker, extend_batch([Part(rid, 0, 0, extend)], TABLE))[1]


def test_what_remains_of_a_forgotten_request_has_no_tail(worker):
    """It was aborted between its chunks: SGLang may have scheduled the next one."""
    worker.tails.forget(1)
    worker.tails.forget(1)
    assert tail_of(worker, "a") == []


def test_a_request_that_is_sent_again_is_not_forgotten_with_its_first_room(worker):
    """A client may try again under the same name before SGLang is done with what was aborted."""
    worker.tails.expect("a", 2, 12)
    worker.tails.forget(1)
    assert tail_of(worker, "a", 12) == [8, 9, 10, 11]
    worker.tails.forget(2)
    assert tail_of(worker, "a", 12) == []


def test_a_room_that_is_used_again_is_of_its_last_request(worker):
    worker.tails.expect("b", 1, 9)
    assert tail_of(worker, "a") == []
    assert tail_of(worker, "b", 9) == [5, 6, 7, 8]
    worker.tails.forget(1)
    assert tail_of(worker, "b", 9) == []


def test_nothing_is_held_of_requests_that_are_forgotten(worker):
    for room in range(2, 50):
        worker.tails.expect(f"r{room}", room, 10)
        worker.tails.forget(room)
    worker.tails.forget(1)
    assert not worker.tails._prompts
