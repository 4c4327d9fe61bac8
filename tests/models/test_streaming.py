"""A model whose blocks come from the checkpoint when they run: the whole model's results, in bounded memory."""

from __future__ import annotations

import pytest
import torch
from searches import stages_of
from tinyfamilies import taking

from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.models import resolve
from pdtrim_deploy.models.blockwise import Blockwise
from pdtrim_deploy.models.loading import load_model
from pdtrim_deploy.models.streaming import stream_model, whole_block
from pdtrim_deploy.models.surgery import keep_blocks
from pdtrim_deploy.pruning.candidates import find
from pdtrim_deploy.pruning.evaluator import InProcess
from pdtrim_deploy.pruning.objective import NextTokenLoss
from pdtrim_deploy.pruning.solution import Solution
from pdtrim_deploy.pruning.students import Students
from pdtrim_deploy.pruning.students.states import HiddenFiles
from pdtrim_deploy.recipe.healing import StudentsSection


@pytest.fixture(params=taking("distil"))
def checkpoint(request, tiny_dir, cache):
    return resolve(f"hf:{tiny_dir(request.param)}", cache)


def text(batch, tokens):
    return torch.randint(3, 259, (batch, tokens), generator=torch.Generator().manual_seed(0))


def held(model):
    """Blocks with a weight in memory."""
    return {n for n, layer in enumerate(model.model.layers) if any(not p.is_meta for p in layer.parameters())}


@torch.no_grad()
def test_it_computes_what_the_whole_model_does_and_holds_no_more(checkpoint):
    whole, ids = load_model(checkpoint.path), text(2, 12)
    model, blocks = stream_model(checkpoint, 2)
    assert held(model) == set()
    assert torch.equal(model(ids).logits, whole(ids).logits)
    assert held(model) == set()
    assert len(blocks.alive) == 2
    assert blocks.reads == len(whole.model.layers)
    left = (0, 2, 5)
    assert torch.equal(keep_blocks(model, left)(ids).logits, keep_blocks(whole, left)(ids).logits)
    assert len(blocks.alive) == 2


def test_a_students_parents_are_read_and_it_is_the_same(checkpoint, tmp_path):
    whole, ids = load_model(checkpoint.path), text(6, 40)
    model, blocks = stream_model(checkpoint, 1)
    section = StudentsSection(steps=3, batch=2)
    known = Students(whole, ids, section).tensors((2, 3))
    students = Students(model, ids, section, cache=Cache(tmp_path))
    streamed, student = students.tensors((2, 3)), students.layer((2, 3))
    assert streamed.keys() == known.keys()
    assert all(torch.equal(streamed[name], tensor) for name, tensor in known.items())
    assert held(model) == set()  # neither teaching nor the student gave the model weights
    assert len(blocks.alive) == 1
    x = torch.randn(2, 7, 64)
    runner, dense = Blockwise(model), Blockwise(whole)
    with torch.no_grad():
        block = whole_block(model, 4)
        assert torch.equal(runner.block(4, x, runner.span(x), student=block), dense.block(4, x, dense.span(x)))
        assert not torch.equal(runner.block(2, x, runner.span(x), student=student), dense.block(2, x, dense.span(x)))
        block.mlp.down_proj.weight.zero_()  # its own: the model's stays
        assert torch.equal(runner.block(4, x, runner.span(x)), dense.block(4, x, dense.span(x)))


def test_a_search_finds_the_same_and_reads_each_block_once_for_all_candidates(checkpoint, tmp_path):
    whole, ids = load_model(checkpoint.path), text(6, 40)
    model, blocks = stream_model(checkpoint, 1)
    assert find(model, ids) == find(whole, ids)
    states_bytes = 6 * 20 * 64 * 4
    streamed = stages_of(model, ids, 1, 3, memory=states_bytes, disk=4 * states_bytes, folder=tmp_path)
    known = stages_of(whole, ids, 1, 3)
    assert (streamed.prefill.removed, streamed.decode.removed) == (known.prefill.removed, known.decode.removed)
    assert streamed.decode.loss == known.decode.loss
    evaluator, before = InProcess(NextTokenLoss(model, ids)), blocks.reads
    evaluator.evaluate([Solution.of({block}) for block in range(6)], 0)
    assert blocks.reads - before == 6
    assert sorted(tmp_path.glob("*")) == sorted(tmp_path.glob("search-*.jsonl"))  # files of states have no name


def test_a_model_that_runs_again_and_again_is_read_for_what_has_no_room(checkpoint):
    """Of six blocks five stay but for one a run, forwards, and forwards and backwards; of half of them three."""
    forwards, backwards = [*range(6)], [*reversed(range(6))]
    for most, order, once in ((5, forwards, 1.5), (3, forwards, 4.5), (5, forwards + backwards, 3), (3, [2, 3, 4], 0)):
        _, blocks = stream_model(checkpoint, most)
        for block in order * 8:
            assert blocks[block]
            assert len(blocks.alive) <= most
        assert blocks.reads <= 6 + 8 * once


def test_all_of_the_text_goes_through_a_block_before_the_next_one_is_read(checkpoint, tmp_path):
    """Of an 8B model each pass over the text is sixteen gigabytes of reading."""
    ids, count = text(9, 12), len(load_model(checkpoint.path).model.layers)
    model, blocks = stream_model(checkpoint, 1)

    def reads(run):
        before = blocks.reads
        run()
        return blocks.reads - before

    assert reads(lambda: find(model, ids)) == count
    assert reads(lambda: HiddenFiles.record(model, ids, tmp_path)) == count
    objective = NextTokenLoss(model, ids, 6, Solution.of((2,)))
    assert objective.batches > 1
    assert reads(lambda: objective.start(0)) == count - 1, "prompts of all batches"
    assert reads(lambda: objective.start(1)) == 0
    assert reads(lambda: NextTokenLoss(model, ids, 6)) == 0, "of prompts that nobody asks for"


def test_a_module_replaced_by_hand_keeps_its_weights(checkpoint):
    model, _ = stream_model(checkpoint, 1)
    layer = model.model.layers[3].mlp.down_proj
    parameter = torch.nn.Parameter(torch.zeros(layer.weight.shape), requires_grad=False)
    layer._parameters["weight"] = parameter
    with torch.no_grad():
        model(text(1, 4))
    assert layer.weight is parameter
