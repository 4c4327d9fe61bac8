"""Annealing: finds the best there is, goes on where it was killed, and does not depend on workers or memory."""

import copy
import itertools
import json
import os
import re

import pytest
import torch
from searches import stages_of
from tinypd import BLOCKS, FAMILIES, make_plan, text, tiny

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.models.oracle import PDOracle
from pdtrim_deploy.models.surgery import keep_blocks
from pdtrim_deploy.plan import KVSend, PDPlan
from pdtrim_deploy.pruning.evaluator import InProcess, mean_loss
from pdtrim_deploy.pruning.hidden_states import _Files
from pdtrim_deploy.pruning.objective import NextTokenLoss
from pdtrim_deploy.pruning.search import Problem, Settings, Trajectory
from pdtrim_deploy.pruning.search.anneal import Anneal
from pdtrim_deploy.pruning.solution import NOTHING, Solution

SPLIT = 10


class Halves:
    """Students that do less than both blocks and more than one: block i with its MLP output doubled."""

    def __init__(self, model):
        self.model, self.taught = model, []

    def layer(self, pair):
        self.taught.append(pair)
        student = copy.deepcopy(self.model.model.layers[pair[0]])
        student.mlp.down_proj.weight.data *= 2
        return student

    def tensors(self, pair):
        return {"mlp.down_proj.weight": self.model.model.layers[pair[0]].mlp.down_proj.weight * 2}


class Both(torch.nn.Module):
    """Nearly the pair: block i, then the MLP of block i + 1."""

    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, hidden, **more):
        hidden = self.first(hidden, **more)
        return hidden + self.second.mlp(self.second.post_attention_layernorm(hidden))


class Good(Halves):
    def layer(self, pair):
        return Both(*(self.model.model.layers[block] for block in pair))


@pytest.fixture(scope="module")
def model():
    return tiny("Llama")


@pytest.fixture(scope="module")
def ids():
    return text(6, 30)


def problem(model, ids, remove, *, forced=NOTHING, workers=1, memory=1 << 30, pairs=(), students=Halves, **more):
    students = students(model) if pairs else None
    objective = NextTokenLoss(model, ids, SPLIT, forced, students)
    evaluator = InProcess(objective, memory)
    evaluator.workers = workers
    return Problem(model, ids, objective, remove, forced, pairs=pairs, evaluator=evaluator, **more)


def quiet(_):
    pass


def pd_loss(model, ids, prefill, decode):
    """By whole stage models and the oracle."""
    students = Halves(model)
    shape = make_plan().model
    actions = [solution.actions(BLOCKS) for solution in (prefill, decode)]
    layers = BLOCKS - decode.saved
    plan = PDPlan(model=shape, prefill=actions[0], decode=actions[1], kv=(KVSend(),) * layers)
    stages = [
        keep_blocks(model, plan.layers(stage), {pair[0]: students.tensors(pair) for pair in solution.pairs})
        for stage, solution in (("prefill", prefill), ("decode", decode))
    ]
    oracle = PDOracle(*stages, plan)
    return -float(oracle.score(oracle.prefill(ids[:, :SPLIT]), ids[:, SPLIT:])[:, 1:].double().mean())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_best_of_all_is_found(family):
    model, ids = tiny(family), text(4, 20)
    result = Anneal(Settings(steps=120), hot=3).run(problem(model, ids, 2), quiet)
    losses = {s: pd_loss(model, ids, NOTHING, Solution(s)) for s in itertools.combinations(range(BLOCKS), 2)}
    assert result.solution.removed == min(losses, key=losses.__getitem__)
    assert result.loss == pytest.approx(min(losses.values()), abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_pairs_are_judged_as_the_oracle_serves_them(family):
    model, ids = tiny(family), text(4, 20)
    forced = Solution((4,), (2,))
    objective = NextTokenLoss(model, ids, SPLIT, forced, Halves(model))
    for decode in (forced, Solution((4,), (0, 2)), Solution((0, 4), (2,))):
        loss = mean_loss(InProcess(objective), decode)
        assert loss == pytest.approx(pd_loss(model, ids, forced, decode), abs=1e-4)
    with pytest.raises(ValueError, match="overlap"):
        Solution((2,), (1,))


def test_pairs_come_in_where_they_cost_less(model):
    torch.manual_seed(1)
    ids = torch.randint(0, 97, (6, 1))
    with torch.no_grad():
        for _ in range(29):  # text that the model itself likes: the less of it is lost, the better
            ids = torch.cat(
                (ids, torch.distributions.Categorical(logits=model(ids).logits[:, -1]).sample()[:, None]), 1
            )
    search_problem = problem(model, ids, 2, pairs=(0, 3), students=Good)
    result = Anneal(Settings(steps=200), hot=3).run(search_problem, quiet)
    every = [Solution(s) for s in itertools.combinations(range(BLOCKS), 2)]
    pairs = range(BLOCKS - 1)
    every += [Solution((b,), (p,)) for p in pairs for b in range(BLOCKS) if b not in (p, p + 1)]
    every += [Solution((), (p, q)) for p, q in itertools.combinations(pairs, 2) if q > p + 1]
    losses = {s: mean_loss(search_problem.evaluator, s) for s in every}
    best = min(every, key=losses.__getitem__)
    assert result.solution == best
    assert best.distilled  # else this test shows nothing
    assert result.loss == pytest.approx(losses[best], abs=1e-6)
    assert result.solution.saved == len(result.trajectory) == 2


def rows_of(path):
    rows = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    rows = [row for row in rows if "race" not in row]
    return [{k: v for k, v in row.items() if k not in ("seconds", "block_forwards")} for row in rows]


@pytest.mark.parametrize("stop", [3, 9, 26])
def test_a_killed_search_gives_what_an_unbroken_one_does(model, ids, tmp_path, stop):
    def run(path, steps=40):
        trajectory = Trajectory(path, ["same", steps])
        return Anneal(Settings(seed=5, steps=steps)).run(
            problem(model, ids, 2, pairs=(1, 3), trajectory=trajectory), note
        )

    def note(_):
        if killed and len(killed[0].read_text().splitlines()) > stop:
            raise KeyboardInterrupt

    killed = []
    whole = run(tmp_path / "whole")
    killed = [tmp_path / "cut"]
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut")
    kept = rows_of(tmp_path / "cut")
    assert len(kept) < 42
    assert stop < (tmp_path / "cut").read_text().count("\n") <= stop + 2
    with (tmp_path / "cut").open("a") as file:
        file.write('{"step": 7, "rem')  # killed while it wrote
    killed = []
    again = run(tmp_path / "cut")
    assert rows_of(tmp_path / "cut")[: len(kept)] == kept
    assert rows_of(tmp_path / "cut") == rows_of(tmp_path / "whole")
    assert (again.removed, again.distilled, again.loss) == (whole.removed, whole.distilled, whole.loss)
    done = problem(model, ids, 2, pairs=(1, 3), trajectory=Trajectory(tmp_path / "cut", ["same", 40]))
    prepared = done.evaluator.block_forwards
    assert Anneal(Settings(seed=5, steps=40)).run(done, quiet).solution == whole.solution
    assert done.evaluator.block_forwards == prepared  # a finished search runs nothing
    run(tmp_path / "cut", steps=41)  # another search: nothing of the old one counts
    assert len(rows_of(tmp_path / "cut")) == 43


def test_a_seed_fixes_the_chain_whatever_the_workers_and_the_memory(model, ids, tmp_path):
    results, chains = [], []
    for name, more in {"one": {}, "three": {"workers": 3}, "little": {"memory": 60_000}, "none": {"memory": 0}}.items():
        trajectory = Trajectory(tmp_path / name)
        results.append(
            Anneal(Settings(seed=1, steps=30)).run(problem(model, ids, 2, trajectory=trajectory, **more), quiet)
        )
        chains.append([(row.get("move"), row["removed"], row.get("accepted")) for row in rows_of(tmp_path / name)])
    assert chains == [chains[0]] * 4
    assert len({result.removed for result in results}) == 1
    other = Trajectory(tmp_path / "other")
    Anneal(Settings(seed=2, steps=30)).run(problem(model, ids, 2, trajectory=other), quiet)
    assert [row["removed"] for row in rows_of(tmp_path / "other")] != [row[1] for row in chains[0]]


def test_time_ends_it_and_the_best_so_far_is_the_answer(model, ids, tmp_path):
    Anneal(Settings(steps=30)).run(problem(model, ids, 2, trajectory=Trajectory(tmp_path / "t")), quiet)
    lines = []
    trajectory = Trajectory(tmp_path / "t")
    short = Anneal(Settings(steps=60, minutes=1e-9)).run(problem(model, ids, 2, trajectory=trajectory), lines.append)
    assert "minutes are over after 30 of 60 steps" in lines[-1]
    rows = rows_of(tmp_path / "t")
    assert short.loss == min(
        row["loss"] for row in rows if row.get("accepted", row.get("removed") == rows[1]["removed"])
    )


def minutes_left(line):
    return float(re.search(r"([0-9.]+) min left$", line)[1])


def test_the_time_left_counts_steps_alone_and_not_beyond_the_minutes(model, ids, monkeypatch):
    """A step takes a minute, the greedy start an hour."""
    now, lines = [0.0], []
    for module in ("anneal", "trajectory", "base", "greedy"):
        monkeypatch.setattr(f"pdtrim_deploy.pruning.search.{module}.monotonic", lambda: now[0])

    def note(line):
        lines.append(line)
        now[0] += 3600 if "removed block" in line else 0

    real = Anneal._judge
    monkeypatch.setattr(Anneal, "_judge", lambda *a: (now.__setitem__(0, now[0] + 60), real(*a))[1])
    Anneal(Settings(steps=5)).run(problem(model, ids, 1), note)
    assert [minutes_left(line) for line in lines if line.startswith("anneal")] == [4, 3, 2, 1, 0]
    lines.clear()
    Anneal(Settings(steps=5, minutes=63)).run(problem(model, ids, 1), note)
    assert [minutes_left(line) for line in lines if line.startswith("anneal ")] == [2, 1, 0, 0]


def test_other_searches_say_the_time_left_too(model, ids):
    for method in ("greedy", "sleb", "perplexity"):
        lines = []
        stages_of(model, ids, 0, 2, method=method, progress=lines.append)
        assert minutes_left(lines[-1]) == 0


def test_both_stages_leave_their_trajectory_and_nest(model, ids, tmp_path):
    students = Halves(model)
    settings = Settings(steps=25)
    stages = stages_of(
        model, ids, 1, 3, method="anneal", settings=settings, pairs=(0, 2), students=students, folder=tmp_path
    )
    assert stages.prefill.solution.within(stages.decode.solution)
    assert (stages.prefill.solution.saved, stages.decode.solution.saved) == (1, 3)
    assert {p.name for p in tmp_path.iterdir()} == {"search-prefill.jsonl", "search-decode.jsonl"}
    expected = mean_loss(
        InProcess(NextTokenLoss(model, ids, 15, stages.prefill.solution, students)), stages.decode.solution
    )
    assert stages.decode.loss == pytest.approx(expected, abs=1e-5)


def test_hidden_states_stay_within_memory_and_save_work(model, ids):
    def spend(memory):
        objective = NextTokenLoss(model, ids, SPLIT)
        objective.start(0)  # prompts are read
        evaluator, before = InProcess(objective, memory), objective.block_forwards
        evaluator.settle(Solution((3,)))
        for block in (3, 4, 2, 1):
            for batch in range(evaluator.batches):
                evaluator.evaluate([Solution.of({3, block})], batch)
                assert evaluator._states.held <= memory
        return objective.block_forwards - before

    states = 6 * (30 - SPLIT - 1) * 24 * 4
    assert spend(1 << 30) == 6 * (4 + 0 + 1 + 2) < spend(2 * states) < spend(0) == 6 * (4 + 3 + 3 + 3)


def test_what_memory_has_no_room_for_is_kept_in_files(model, ids, tmp_path):
    states = 6 * (30 - SPLIT - 1) * 24 * 4

    def spend(memory, disk):
        objective = NextTokenLoss(model, ids, SPLIT)
        evaluator, losses = InProcess(objective, memory, disk, tmp_path), []
        for block in (3, 4, 2, 1):
            for batch in range(evaluator.batches):
                losses += evaluator.evaluate([Solution.of({0, block})], batch)
                assert evaluator._states.held <= memory
                assert evaluator._states.on_disk <= disk
        return objective.block_forwards, torch.cat(losses)

    (most, plain), (least, kept), (with_files, mapped) = spend(0, 0), spend(1 << 30, 0), spend(2 * states, 1 << 30)
    assert with_files == least < most
    assert torch.equal(mapped, kept)
    assert torch.equal(mapped, plain)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"no room for hidden states in .*lower pruning.disk_mb"):
        InProcess(NextTokenLoss(model, ids, SPLIT), 0, 1 << 30, tmp_path / "file").evaluate([NOTHING], 0)


def test_states_in_files_hold_no_descriptors(tmp_path):
    states, before = _Files(1 << 20, tmp_path), len(os.listdir("/proc/self/fd"))
    kept = [torch.full((2, 3, 4), float(n)) for n in range(40)]
    for n, state in enumerate(kept):
        states.keep((n, ()), state, [])
    assert len(os.listdir("/proc/self/fd")) == before
    assert not list(tmp_path.iterdir())
    assert all(torch.equal(states.states[n, ()], state) for n, state in enumerate(kept))


def test_what_goes_wrong_is_one_sentence(model, ids, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*it goes on where it was"):
        Trajectory(tmp_path / "file" / "below")
    broken = tiny("Llama")
    broken.model.layers[0].mlp.down_proj.weight.data[0, 0] = torch.nan
    for method in ("anneal", "greedy", "sleb", "perplexity"):
        with pytest.raises(UserError, match="loss is not a number"):
            stages_of(broken, text(2, 12), 0, 1, method=method)
