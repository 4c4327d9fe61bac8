"""Pruning and distillation sets: disjoint, whole, and measured as transformers' own hidden states say."""

import xml.etree.ElementTree as ET

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tinypd import BLOCKS, FAMILIES, text, tiny

from pdtrim_deploy.pruning.candidates import Candidates, find
from pdtrim_deploy.pruning.redundancy import similarity
from pdtrim_deploy.report.candidates import candidates_picture, candidates_table

cosines = st.lists(st.floats(-1, 1), min_size=2, max_size=20)


@given(cosines, st.floats(-1, 1))
def test_every_block_is_in_just_one_set(pair_redundancy, threshold):
    blocks = len(pair_redundancy) + 1
    candidates = Candidates.of([0.5] * blocks, pair_redundancy, threshold)
    in_pairs = [block for first in candidates.distillation for block in (first, first + 1)]
    assert sorted([*in_pairs, *candidates.pruning]) == list(range(blocks))
    assert all(pair_redundancy[first] > threshold for first in candidates.distillation)
    for first, cosine in enumerate(pair_redundancy):  # no pair above the threshold could still be made
        assert cosine <= threshold or {first, first + 1} & set(in_pairs)


def test_the_most_alike_pairs_come_first():
    candidates = Candidates.of([0.9, 0.99, 0.98, 0.97, 0.2], [0.96, 0.99, 0.97, 0.96], 0.95)
    assert candidates.distillation == (1, 3)
    assert candidates.pruning == (0,)
    assert [candidates.set_of(block) for block in range(5)] == ["prune", *["distil 1+2"] * 2, *["distil 3+4"] * 2]
    assert Candidates.of([0.9, 0.99, 0.98], [0.5, 0.5], 0.95).pruning == (1, 2, 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_cosines_span_blocks(family):
    model, ids = tiny(family), text(5, 12)
    states = [None] * (BLOCKS + 1)
    hooks = [
        layer.register_forward_hook(lambda m, args, out, i=i: states.__setitem__(slice(i, i + 2), (args[0], out)))
        for i, layer in enumerate(model.model.layers)
    ]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    similarities = similarity(model, ids, (1, 2, 4), batch=2)
    for span, values in similarities.items():
        expected = [
            torch.cosine_similarity(states[i][:, 1:], states[i + span][:, 1:], dim=-1).double().mean()
            for i in range(BLOCKS + 1 - span)
        ]
        torch.testing.assert_close(values, torch.stack(expected), atol=1e-6, rtol=0)
    both = find(model, ids, threshold=0.0)
    assert both.redundancy == pytest.approx(similarities[1].tolist())
    assert both.pair_redundancy == pytest.approx(similarities[2].tolist())


def test_table_and_picture_show_every_block():
    candidates = Candidates.of([0.9, 0.99, 0.98, 0.97, 0.2], [0.96, 0.99, 0.97, 0.96], 0.95)
    assert candidates_table(candidates, "m").row_count == 5
    picture = ET.fromstring(candidates_picture(candidates, "hf:a<b"))
    titles = [title.text for title in picture.iter("{http://www.w3.org/2000/svg}title")]
    assert sum("block " in title for title in titles) == 5
    assert [title for title in titles if title.startswith("blocks")] == [
        "blocks 1 and 2: cos 0.9900",
        "blocks 3 and 4: cos 0.9600",
    ]
