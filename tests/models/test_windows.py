"""Models with sliding windows and, gpt-oss, learned sinks: the PD oracle against plain transformers, in float32."""

from __future__ import annotations

import json

import pytest
import torch
from randomtext import plain, text
from tinyfamilies import WINDOW

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.kvcache.layout import chunk_layout
from pdtrim_deploy.kvcache.pack import pack, unpack
from pdtrim_deploy.models.checkpoint import read_checkpoint
from pdtrim_deploy.models.families import WINDOWED
from pdtrim_deploy.models.loading import check_loads, load_model
from pdtrim_deploy.models.oracle import PDOracle
from pdtrim_deploy.plan import KVSend, PDPlan


@pytest.fixture(params=WINDOWED, scope="module")
def dense(request, tiny_dir):
    """The oracle of a family's uncut plan."""
    folder = tiny_dir(request.param)
    model, shape = load_model(folder), read_checkpoint(folder).shape()
    assert set(shape.windows) == {WINDOW, None}
    return PDOracle(model, model, PDPlan.dense(shape))


@pytest.mark.parametrize("prompt", [1, WINDOW - 2, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW + 3])
def test_an_uncut_plan_is_plain_transformers(dense, prompt):
    ids = text(2, prompt + 2 * WINDOW)
    scores = dense.score(dense.prefill(ids[:, :prompt]), ids[:, prompt:])
    torch.testing.assert_close(scores, plain(dense, ids)[:, prompt - 1 :], atol=1e-4, rtol=0)
    token = torch.stack([dense.greedy(ids[0, :prompt], 6)])
    grown = torch.cat((ids[:1, :prompt], token), 1)
    logits = dense.prefill_model(grown, use_cache=False).logits[0, prompt - 1 : -1]
    assert torch.equal(logits.argmax(-1), token[0])  # token by token, behind a KV that grows past the window


def test_a_row_of_each_window_less_is_another_model_and_none_more_is_needed(dense):
    prompt, ids = 2 * WINDOW, text(1, 2 * WINDOW + 8)
    state, windows = dense.prefill(ids[:, :prompt]), dense.plan.model.windows
    right = dense.score(state, ids[:, prompt:])
    less = dense.with_windows(tuple(w and w - 1 for w in windows)).score(state, ids[:, prompt:])
    more = dense.with_windows(tuple(w and w + 3 for w in windows)).score(state, ids[:, prompt:])
    assert (less - right).abs().max() > 1e-3
    torch.testing.assert_close(more, right, atol=1e-5, rtol=0)


def test_chunks_of_any_size_bring_what_one_brings(dense):
    prompt = 2 * WINDOW + 3
    state, plan = dense.prefill(text(1, prompt)), dense.plan.with_kv((KVSend(wire_dtype="int8"),) * 6)
    slots = torch.arange(prompt)
    for step in (1, 4, WINDOW, prompt):
        keys, values = ([torch.full_like(pool, torch.nan) for pool in side] for side in (state.keys, state.values))
        for start in range(0, prompt, step):
            stop = min(prompt, start + step)
            layout = chunk_layout(plan, prompt, start, stop)
            packed = pack(layout, state.keys, state.values, slots[start:stop])
            unpack(layout, packed, keys, values, slots[start:stop])
        for held, k, v, send in zip(dense.with_kv(plan.kv).hand_over(state), keys, values, plan.kv, strict=True):
            first = prompt - send.rows(prompt)
            assert torch.equal(held.keys[0].transpose(0, 1), k[first:])
            assert torch.equal(held.values[0].transpose(0, 1), v[first:])
            assert k[:first].isnan().all()


def test_a_cut_of_full_layers_leaves_windows_as_they_are(dense):
    prompt, ids = 3 * WINDOW, text(1, 3 * WINDOW + 8)
    state, right = dense.prefill(ids[:, :prompt]), plain(dense, ids)[:, prompt - 1 :]
    cut = dense.with_kv((KVSend(mode="sparse", n_first=2, n_last=4),) * 6)
    assert [send.mode for send in cut.plan.kv].count("window") == sum(w is not None for w in dense.plan.model.windows)
    assert (cut.score(state, ids[:, prompt:]) - right).abs().max() > 1e-2
    enough = dense.with_kv((KVSend(mode="sparse", n_first=2, n_last=prompt),) * 6)
    torch.testing.assert_close(enough.score(state, ids[:, prompt:]), right, atol=1e-4, rtol=0)


@pytest.mark.parametrize("architecture", WINDOWED)
def test_a_checkpoint_is_run_once_and_its_modules_windows_are_the_plans(architecture, tiny_model, tmp_path):
    folder = tiny_model(tmp_path / "m", architecture)
    check_loads(read_checkpoint(folder))
    config = json.loads((folder / "config.json").read_text())
    kinds, windows = config["layer_types"], read_checkpoint(folder).shape().windows
    kinds[2] = "sliding_attention" if kinds[2] == "full_attention" else "full_attention"
    (folder / "config.json").write_text(json.dumps(config))
    changed = read_checkpoint(folder)
    check_loads(changed)
    assert changed.shape().windows == (*windows[:2], WINDOW if windows[2] is None else None, *windows[3:])


@pytest.mark.parametrize("architecture", WINDOWED)
def test_windows_are_read_as_transformers_reads_them(architecture):
    """Where config.json has no list of layers."""
    family = WINDOWED[architecture]
    config = family.model_class.config_class(num_hidden_layers=13)
    kinds = [kind == "sliding_attention" for kind in config.layer_types]
    windows = family.block_windows({"num_hidden_layers": 13, "sliding_window": config.sliding_window})
    assert [window is not None for window in windows or (None,) * 13] == kinds
    every = family.block_windows({"num_hidden_layers": 4, "sliding_window": 8, "sliding_window_pattern": 2})
    assert every == (8, None, 8, None)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layer_types": ["full_attention"]}, "key layer_types has 1 entries of full_attention"),
        ({"layer_types": ["chunked_attention", "full_attention"]}, "chunked_attention, full_attention; it must have"),
        ({"sliding_window": None}, "key sliding_window is None; it must be a whole number of at least 2"),
    ],
)
def test_other_layers_are_refused(changes, words):
    with pytest.raises(UserError, match=words):
        WINDOWED["Gemma3ForCausalLM"].block_windows({"num_hidden_layers": 2, "sliding_window": 8} | changes, "here")
