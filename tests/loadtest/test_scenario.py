"""Scenarios: one sentence for each mistake; requests have the specified times, lengths and prefixes."""

import json
import math
from itertools import islice, pairwise
from pathlib import Path
from statistics import fmean, median

import pytest

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.loadtest.scenario import Arrivals, Conversations, Lengths, Prefixes, Scenario
from pdtrim_deploy.loadtest.schedule import jobs

SCENARIOS = Path(__file__).parents[2] / "scenarios"
TRACE = [
    {"timestamp": 1000, "input_length": 25, "output_length": 4, "hash_ids": [1, 2, 3]},
    {"timestamp": 1500, "input_length": 32, "output_length": 8, "hash_ids": [1, 2, 4]},
    {"timestamp": 4000, "input_length": 7, "output_length": 2},
]


def load(tmp_path: Path, text: str) -> Scenario:
    (tmp_path / "s.yaml").write_text(text)
    return Scenario.load(tmp_path / "s.yaml")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("arrivals: {kind: burst}", "s.yaml: arrivals.kind is 'burst'; allowed: constant, poisson, ramp, concurrency"),
        ("arrivals: {kind: poisson}", "s.yaml: arrivals.kind is 'poisson', which needs rate; allowed with it: rate"),
        ("arrivals: {kind: poisson, rate: 0}", "s.yaml: arrivals.rate is 0; allowed: a number above 0"),
        ("arrivals: {kind: concurrency, clients: 2, rate: 1}", "which takes no rate; allowed with it: clients"),
        ("arrivals: {kind: ramp, rate: 1, to_rate: 2}", "s.yaml: duration_s is missing; allowed with arrivals of kind"),
        ("input: {kind: uniform, low: 9, high: 3}", "s.yaml: input.low is 9 but high is 3"),
        ("output: {kind: lognormal, tokens: 9}", "s.yaml: output.kind is 'lognormal', which needs spread"),
        ("output: 3", "s.yaml: output is 3; allowed: a mapping with kind, tokens"),
        ("sed: 3", "s.yaml: sed is not a known key; allowed here: include, name, arrivals"),
        ("slo: {ttft: 3}", "s.yaml: slo.ttft is not a known key; allowed here: ttft_ms, itl_ms"),
        ("prefixes: {tokens: 4, share: 1.5}", "s.yaml: prefixes.share is 1.5; allowed: a number above 0 and up to 1"),
        (
            "input: {tokens: 4}\ntrace: {path: t}",
            "s.yaml: trace sets times and lengths of the requests; leave out input",
        ),
        ("arrivals: {kind: constant, rate: .inf}", "arrivals.rate is inf; allowed: a finite number above 0 and up to"),
        ("arrivals: {kind: constant, rate: 1.0e+300}", "arrivals.rate is 1e+300; allowed: a number above 0 and up to"),
        ("arrivals: {clients: 100000000}", "arrivals.clients is 100000000; allowed: an integer from 1 to 10000"),
        ("input: {kind: normal, tokens: 9, spread: .inf}", "input.spread is inf; allowed: a finite number above 0"),
        ("input: {kind: lognormal, tokens: 9, spread: 200.0}", "input.spread is 200, of the natural logarithm; allo"),
        ("warmup: 1000000000000000000000000000000", "allowed: an integer from 0 to 10000000"),
        ("deadline_s: .nan", "s.yaml: deadline_s is nan; allowed: a finite number above 0"),
        (
            "trace: {path: t, scale: .inf}",
            "s.yaml: trace.scale is inf; allowed: a finite number above 0 and up to 1000",
        ),
        ("trace: {path: t, speed: 1.0e-300}", "trace.speed is 1e-300; allowed: a number of at least 1e-06"),
        ("conversations: {turns: 1}", "s.yaml: conversations.turns is 1; allowed: an integer from 2 to 1000"),
        (
            "conversations: {turns: 2}\ntrace: {path: t}",
            "s.yaml: trace sets times and lengths of the requests; leave out con",
        ),
        ("trace: {path: gone.jsonl}", "s.yaml: trace.path names gone.jsonl, which is not a file"),
    ],
)
def test_mistakes(tmp_path: Path, text: str, says: str) -> None:
    more = "" if "trace" in text else "requests: 4\n"
    with pytest.raises(UserError) as error:
        load(tmp_path, f"name: a\n{more}{text}\n")
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_load_must_end(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"s.yaml: requests is missing; allowed: requests, duration_s or both"):
        load(tmp_path, "name: a")
    with pytest.raises(UserError, match="no such scenario file"):
        Scenario.load(tmp_path / "gone.yaml")


@pytest.mark.parametrize("path", sorted(SCENARIOS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_scenarios_say_what_they_are_called(path: Path, tmp_path: Path) -> None:
    scenario = Scenario.load(path)
    assert scenario.name == path.stem
    assert list(islice(jobs(scenario), 3))
    assert load(tmp_path, scenario.to_yaml()) == scenario


def due(arrivals: Arrivals, duration_s: float, seed: int = 0) -> list[float]:
    scenario = Scenario(name="a", arrivals=arrivals, input=Lengths(tokens=1), duration_s=duration_s, seed=seed)
    return [job.due_s for job in jobs(scenario)]


def test_constant_arrivals_are_even() -> None:
    times = due(Arrivals(kind="constant", rate=4.0), 10.0)
    assert len(times) == 41
    assert all(b - a == pytest.approx(0.25) for a, b in pairwise(times))


def test_poisson_arrivals_have_exponential_gaps() -> None:
    times = due(Arrivals(kind="poisson", rate=5.0), 1000.0)
    gaps = [b - a for a, b in pairwise(times)]
    assert len(times) == pytest.approx(5000, rel=0.05)
    assert fmean(gaps) == pytest.approx(0.2, rel=0.05)
    assert median(gaps) == pytest.approx(0.2 * math.log(2), rel=0.08)
    assert times != due(Arrivals(kind="poisson", rate=5.0), 1000.0, seed=1)


@pytest.mark.parametrize(("rate", "to_rate"), [(1.0, 9.0), (9.0, 1.0)])
def test_a_ramp_has_the_rate_of_each_of_its_halves(rate: float, to_rate: float) -> None:
    times = due(Arrivals(kind="ramp", rate=rate, to_rate=to_rate), 400.0)
    first = sum(time < 200 for time in times)
    assert first == pytest.approx(200 * (3 * rate + to_rate) / 4, rel=0.1)
    assert len(times) - first == pytest.approx(200 * (rate + 3 * to_rate) / 4, rel=0.1)


@pytest.mark.parametrize(
    ("lengths", "middle", "ends"),
    [
        (Lengths(tokens=7), 7, (7, 7)),
        (Lengths(kind="uniform", low=10, high=30), 20, (10, 30)),
        (Lengths(kind="normal", tokens=100, spread=20.0, low=60, high=150), 100, (60, 150)),
        (Lengths(kind="lognormal", tokens=50, spread=1.0, low=5, high=400), 50, (5, 400)),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
def test_lengths_follow_their_distribution(lengths: Lengths, middle: int, ends: tuple[int, int]) -> None:
    scenario = Scenario(name="a", input=lengths, output=Lengths(tokens=1), requests=2000)
    drawn = [len(job.prompt.split()) for job in jobs(scenario)]
    assert median(drawn) == pytest.approx(middle, rel=0.08)
    assert (min(drawn), max(drawn)) == ends


def test_requests_share_prefixes_as_often_as_asked_and_nothing_else() -> None:
    scenario = Scenario(
        name="a", input=Lengths(tokens=20), prefixes=Prefixes(count=2, tokens=30, share=0.75), requests=400
    )
    prompts = [job.prompt.split() for job in jobs(scenario)]
    shared = [prompt for prompt in prompts if len(prompt) == 50]
    assert len(shared) == pytest.approx(300, abs=40)
    assert {len(prompt) for prompt in prompts} == {20, 50}
    assert len({tuple(prompt[:30]) for prompt in shared}) == 2
    assert len({tuple(prompt[-20:]) for prompt in prompts}) == 400


def test_turns_of_a_conversation_are_requests_with_texts_of_their_own() -> None:
    turns = Conversations(turns=4)
    scenario = Scenario(
        name="a", input=Lengths(tokens=20), conversations=turns, prefixes=Prefixes(tokens=9), requests=10
    )
    planned = list(jobs(scenario))
    assert [1 + len(job.later) for job in planned] == [4, 4, 2], "requests count turns"
    words = [[len(part.prompt.split()) for part in (job, *job.later)] for job in planned]
    assert words == [[29, 20, 20, 20], [29, 20, 20, 20], [29, 20]], "only the first turn has the shared prefix"
    assert len({part.prompt for job in planned for part in (job, *job.later)}) == 10
    assert not any(job.later for job in jobs(scenario.warming()))


def test_warm_up_draws_texts_of_its_own() -> None:
    scenario = Scenario(name="a", requests=20, warmup=5)
    warm = [job.prompt for job in jobs(scenario.warming())]
    assert len(warm) == 5
    assert not {*warm} & {job.prompt for job in jobs(scenario)}


def test_a_trace_keeps_times_lengths_and_what_is_shared(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, TRACE)))
    scenario = load(tmp_path, "name: a\ntrace: {path: t.jsonl, block_tokens: 10, speed: 2}")
    planned = list(jobs(scenario))
    words = [job.prompt.split() for job in planned]
    assert [job.due_s for job in planned] == [0.0, 0.25, 1.5]
    assert [len(prompt) for prompt in words] == [25, 32, 7]
    assert [job.output_tokens for job in planned] == [4, 8, 2]
    assert words[0][:20] == words[1][:20]
    assert words[0][20:25] != words[1][20:25]
    smaller = list(jobs(scenario.changed(trace=scenario.trace.model_copy(update={"scale": 0.2}), requests=2)))
    words = [job.prompt.split() for job in smaller]
    assert [len(prompt) for prompt in words] == [5, 6]
    assert words[0][:4] == words[1][:4]


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (["{}"], "line 1 is not a request; allowed: JSON with a finite timestamp"),
        ([json.dumps(TRACE[0]), "[1]"], "line 2 is not a request"),
        ([json.dumps(TRACE[1]), json.dumps(TRACE[0])], "line 2 is earlier than the line before"),
        (['{"timestamp": NaN, "input_length": 5, "output_length": 5}'], "line 1 is not a request"),
        (['{"timestamp": 0, "input_length": 1e400, "output_length": 5}'], "line 1 is not a request"),
        (['{"timestamp": 0, "input_length": 5, "output_length": -5}'], "output_length from 1 to 10000000"),
        (['{"timestamp": 0, "input_length": 5, "output_length": 5, "hash_ids": [Infinity]}'], "line 1 is not"),
        (["", " "], "no line is a request; give a trace with at least one"),
    ],
)
def test_a_trace_that_cannot_be_read(tmp_path: Path, lines: list[str], says: str) -> None:
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError, match=says):
        load(tmp_path, "name: a\ntrace: {path: t.jsonl}")


def test_the_documented_scenario_is_one(tmp_path: Path) -> None:
    text = (SCENARIOS.parent / "docs" / "how-to" / "load-test.md").read_text()
    scenario = load(tmp_path, text.split("```yaml\n")[1].split("```")[0])
    assert (scenario.name, scenario.slo.ttft_ms) == ("mine", 2000)
