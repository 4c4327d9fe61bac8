"""Student blocks: what stays the parent's, what regression gains, and that each is made once."""

import errno

import pytest
import torch
from tinypd import BLOCKS, FAMILIES, text, tiny

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.models.blockwise import Blockwise
from pdtrim_deploy.models.surgery import keep_blocks
from pdtrim_deploy.pruning.students import Students
from pdtrim_deploy.pruning.students.regression import FROZEN
from pdtrim_deploy.pruning.students.states import HiddenFiles
from pdtrim_deploy.recipe.healing import StudentsSection

PAIR = (1, 2)
SOME = StudentsSection(steps=12, learning_rate=3e-3, batch=2)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_makes_k_and_v_is_the_first_parents_and_the_rest_learns(family):
    model = tiny(family)
    students = Students(model, text(8, 32), SOME)
    parent, got = model.model.layers[1].state_dict(), students.tensors(PAIR)
    assert got.keys() == parent.keys()
    frozen = {name for name in got if name.startswith(FROZEN)}
    kv = {"Qwen2": {"self_attn.k_proj.bias", "self_attn.v_proj.bias"}, "Qwen3": {"self_attn.k_norm.weight"}}
    assert frozen == {"input_layernorm.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"} | kv.get(
        family, set()
    )
    assert all(torch.equal(got[name], parent[name]) for name in frozen)
    moved = {name for name in got if not torch.equal(got[name], parent[name])}
    assert moved == set(got) - frozen
    lesson = students.lesson(PAIR)
    assert lesson["steps"] == 12
    assert lesson["error"] < lesson["error_fit"] < lesson["error_drop"]


@pytest.mark.parametrize("steps", [0, 6])
def test_a_student_comes_nearer_to_what_two_blocks_do_on_new_text(steps):
    model, fresh = tiny("Llama"), text(4, 32, seed=9)
    runner = Blockwise(model)
    student = Students(model, text(48, 32), StudentsSection(steps=steps, batch=2)).tensors(PAIR)
    cut = Blockwise(keep_blocks(model, [0, 1], {1: student}))
    with torch.no_grad():
        hidden, span = runner.embed(fresh)
        x1 = runner.block(0, hidden, span)
        alone = runner.block(1, x1, span)
        both, got = runner.block(2, alone, span), cut.block(1, x1, span)
    error_alone, error = ((x - both).norm(dim=-1) / both.norm(dim=-1) for x in (alone, got))
    assert error.square().mean() < 0.9 * error_alone.square().mean()


def test_equal_seeds_give_equal_students_and_others_do_not():
    model = tiny("Llama")
    first, second, other = (
        Students(model, text(8, 32), SOME.model_copy(update={"seed": seed})).tensors(PAIR) for seed in (0, 0, 1)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_each_is_made_once_also_across_processes(tmp_path, monkeypatch):
    model, cache = tiny("Qwen3"), Cache(tmp_path)
    first = Students(model, text(8, 32), SOME, cache=cache, fingerprint="a")
    weights, lesson = first.tensors(PAIR), first.lesson(PAIR)
    assert first.layer(PAIR) is first.layer(PAIR)
    with monkeypatch.context() as patched:
        patched.setattr(HiddenFiles, "record", lambda *_a, **_k: pytest.fail("made again"))
        again = Students(model, text(8, 32), SOME, cache=cache, fingerprint="a")
        assert all(torch.equal(weights[name], tensor) for name, tensor in again.tensors(PAIR).items())
        assert again.lesson(PAIR) == lesson
    changed = [
        Students(model, text(8, 32, seed=1), SOME, cache=cache, fingerprint="a"),
        Students(model, text(8, 32), SOME, cache=cache, fingerprint="b"),
        Students(model, text(8, 32), StudentsSection(), cache=cache, fingerprint="a"),
    ]
    for students in changed:
        monkeypatch.setattr(
            HiddenFiles, "record", classmethod(lambda *_a, **_k: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        )
        with pytest.raises(UserError, match="no room on the disk"):
            students.layer(PAIR)


def test_hidden_files_hold_what_blocks_read(tmp_path):
    model, ids = tiny("Mistral"), text(5, 16)
    files = HiddenFiles.record(model, ids, tmp_path, batch=2)
    runner = Blockwise(model)
    with torch.no_grad():
        hidden, span = runner.embed(ids)
        for block in range(BLOCKS):
            torch.testing.assert_close(files[block], hidden)
            hidden = runner.block(block, hidden, span)
    torch.testing.assert_close(files[BLOCKS], hidden)


@pytest.mark.parametrize("pair", [(1, 3), (BLOCKS - 1, BLOCKS), (-1, 0)])
def test_what_is_no_pair_is_refused(pair):
    with pytest.raises(UserError, match="no adjacent pair"):
        Students(tiny("Llama"), text(2, 16), SOME).layer(pair)


def test_a_loss_that_is_not_a_number_is_one_sentence():
    broken = tiny("Llama")
    broken.model.layers[1].mlp.up_proj.weight.data[0] = float("nan")
    with pytest.raises(UserError, match="student of blocks 1 and 2: its error is nan"):
        Students(broken, text(4, 16), SOME).layer(PAIR)
    with pytest.raises(UserError, match=r"lower students\.learning_rate"):
        Students(tiny("Llama"), text(4, 16), StudentsSection(steps=40, learning_rate=1e30)).layer(PAIR)
