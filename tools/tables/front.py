"""The README's two tables: what each switch saves and costs, and what proves a served pair."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tables.base import interval, ratio, rise, table, weights
from tables.kv import uniform
from tables.kvdistil import CORPORA, pairs, rises
from tables.tail import judged, of_all

HELD_OUT = 64  # tokens of each continuation of bench-equalbytes
Data = dict[str, Any]


_TIMED, _SMOLLM2 = ("model", "blocks", "tail"), "SmolLM2-135M"
_LAST_BLOCKS, _LAST, _TAIL = 10, "the last 10, trained longer", 32  # units/healing/kv-only-10-tail.yaml
_KINDS = {"prose": "prose", "dialogue": "agents' conversations", "code": "code"}
_BUDGET_KINDS = ("brown", "code", "agents")
_UNIFORM = {"int4": "all rows in int4", "k4v3": "keys int4 and values int3"}


def switches(
    kv: Data,
    wire: Data,
    kvdistil: Data,
    prefilltime: Data,
    heal: Data,
    claims: Data,
    generated: Data,
    equalbytes: Data,
    tail: Data,
    quality: Data,
    ttft: Data,
) -> str:
    """What each switch saves and costs on the model measured here."""
    rows = {(row["method"], row["asked"]): row for row in kv["rows"]}
    alone = max(row["alone"] for row in prefilltime["rows"])
    (faster,) = (row["faster"] for row in prefilltime["rows"] if row["alone"] == alone)
    trained, costs = _trained(kvdistil, alone)
    steps = trained["setting"]["steps"]
    removed = len(claims["plan"]["decode_dropped"])
    losses = {row["way"]: row["loss"] for row in heal["rows"]}
    refitted, healed = (rise(losses[name], losses["dense"]) for name in ("unhealed", "logits, 1e-4"))
    body = [
        *(_uniform(dtype, rows[f"dense {dtype}", None], wire, generated, quality) for dtype in _UNIFORM),
        _budget(equalbytes),
        (
            f"KV-only prefill: {alone} of 30 blocks compute only K and V, prefill is trained for {steps} steps: "
            f"`healing: {{kv_only_blocks: {alone}, prefill_steps: {steps}, ...}}`",
            f"prefill {faster['median']:.2f}x faster (5% - 95% of rounds: {faster['low']:.2f}-{faster['high']:.2f})",
            ", ".join(f"{costs[corpus]} on {name}" for corpus, name in CORPORA.items()) + _alone_answers(generated),
            "[blocks](docs/benchmarks/blocks.md)",
        ),
        _tail(tail, ttft, quality, generated),
        (
            f"fewer decode blocks: {removed} of 30 removed (experimental): `pruning: {{method: greedy, ...}}`",
            f"{interval(claims['ratios'], 'output tokens/s')} times the output tokens/s, "
            "in one run with KV cut as well",
            f"{healed} healed for {heal['options']['minutes']:g} CPU minutes, {refitted} without (development text)",
            "[blocks](docs/benchmarks/blocks.md)",
        ),
    ]
    planned_tokens = len(next(_of_smollm2(equalbytes))["values"]["brown 512"]["nll"]) * HELD_OUT
    fewest = min(planned_tokens, _tokens(wire) or planned_tokens)
    caption = (
        f"\n\nCosts are rises of perplexity on held-out text, ± one paired standard error "
        f"of {fewest:,} tokens or more. Bytes are exact, against a bfloat16 pool; times are a "
        "CPU's. "
        f"Model: {weights()}, computed in float32{_more(wire)}. "
        "Only the perplexities of the quantised wires and of the budget plan were measured with key scales."
    )
    return table(("switch", "saves", "costs", "measured"), body) + caption


def _tail(tail: Data, ttft: Data, quality: Data, generated: Data) -> tuple[str, str, str, str]:
    """The row of units/healing/kv-only-10-tail.yaml, at every prompt length whose TTFT was measured."""
    ours = {prompt: pair for _, prompt, prefill, tokens, *pair in judged(tail) if (prefill, tokens) == (_LAST, _TAIL)}
    saved, costs = [], []
    for row in (row for row in ttft["rows"] if tuple(row[name] for name in _TIMED) == (_SMOLLM2, _LAST_BLOCKS, _TAIL)):
        prompt = row["prompt"]
        saved.append(f"{ratio(row, 'ratio', 'low', 'high')} after {prompt:,}")
        rows, dense = ours[prompt]
        loss = f"{of_all(rows, dense)} on the mean of four kinds of text"
        if prompt == quality["options"]["prompt"]:  # there it was judged on more text
            loss = _by_kind(quality, f"KV-only prefill, tail of {_TAIL}")
        recall = f"{_right(rows)} of {len(rows['needle']['right'])} facts hidden in a prompt were found"
        costs.append(f"after {prompt:,} prompt tokens {loss}, and {recall} (dense {_right(dense)})")
    return (
        f"KV-only prefill with a tail: the last {_LAST_BLOCKS} of 30 blocks compute only K and V, but the last {_TAIL} "
        "tokens of a prompt run the unchanged model: `include: [units/healing/kv-only-10-tail.yaml]`",
        f"TTFT over dense's: {', '.join(saved)} prompt tokens (95% interval)",
        "; ".join(costs) + _alone_answers(generated, "tokens") + " (half of its prompts have at most 146 tokens)",
        "[blocks](docs/benchmarks/blocks.md#with-a-tail-that-runs-all-blocks)",
    )


def _by_kind(quality: Data, plan: str) -> str:
    """Losses of SmolLM2 behind a plan, by kind of text."""
    judged_on = {row["part"]: row for row in quality["rows"] if row["plan"] == plan and row["model"] == _SMOLLM2}
    losses = [(name, judged_on[part]["recovery"] - 1, judged_on[part]["se"]) for part, name in _KINDS.items()]
    return ", ".join(f"{loss:.2%} ± {error:.2%} on {name}" for name, loss, error in losses)


def _right(rows: dict[str, Data]) -> int:
    return sum(rows["needle"]["right"])


def _trained(kvdistil: Data, alone: int) -> tuple[Data, dict[str, str]]:
    """The newest commit's row of so many blocks, trained on texts of 256 tokens, and what it costs by corpus.

    Raises:
        SystemExit: not one such row.

    """
    rows = [
        (row, losses, dense)
        for row, losses, dense in pairs(kvdistil, "final")
        if (row["setting"]["blocks"], row["setting"].get("length", 256), row["kv"]) == (alone, 256, "native")
        and row["setting"]["steps"]
    ]
    commits = [row["commit"] for row in kvdistil["rows"]]  # newest last
    newest = max((row["commit"] for row, _, _ in rows), key=commits.index, default="")
    matches = [(row, rises(losses, dense)) for row, losses, dense in rows if row["commit"] == newest]
    if len(matches) != 1:
        raise SystemExit(
            f"results/kvdistil.json: its newest commit has {len(matches)} trainings of {alone} blocks on texts of 256 "
            "tokens, judged on final text with native rows; the front page shows one"
        )
    return matches[0]


def _tokens(wire: Data) -> int:
    """Tokens that bench-wire judged; 0 where its file does not say."""
    options = wire.get("options", {})
    return int(options.get("sequences", 0) * options.get("continuation", 0))


def _more(wire: Data) -> str:
    """The other models of bench-wire."""
    names = list(uniform(wire["rows"], "k4v3"))[1:]
    return "".join(f"; {weights(name)}" for name in names)


def _alone_answers(generated: Data, ending: str = "in prefill") -> str:
    """What a model with KV-only blocks still answers, by the end of its plan's name: the last of such plans."""
    right = {row["plan"]: row["right"] for row in generated["rows"] if row["task"] == "humaneval"}
    plans = [plan for plan in right if "K and V alone" in plan and plan.endswith(ending)]
    return "".join(
        f". **With {plan.replace('K and V alone in prefill', 'KV-only')}, not trained, Qwen2.5-Coder-0.5B solves "
        f"{sum(right[plan])} of HumanEval's {len(right[plan])} problems, dense {sum(right['dense'])}**"
        for plan in plans[-1:]
    )


def _of_smollm2(equalbytes: Data) -> Iterator[Data]:
    return (row for row in equalbytes["rows"] if row["model"] == "SmolLM2-135M")


def _budget(equalbytes: Data) -> tuple[str, str, str, str]:
    """The row of the budget plan whose rows are shares of the prompt, at each reduction that was measured."""
    dense, *rows = _of_smollm2(equalbytes)
    parts = []
    for row in (row for row in rows if row["plan"].startswith("budget")):
        values = row["values"]
        (exact,) = (each["exact"] for name, each in values.items() if name.startswith("needle"))
        kinds = {corpus: (values[f"{corpus} 512"], dense["values"][f"{corpus} 512"]) for corpus in _BUDGET_KINDS}
        rises = ", ".join(
            f"{rise(planned['nll'], whole['nll'], whole['documents'])} on {CORPORA[corpus]}"
            for corpus, (planned, whole) in kinds.items()
        )
        saved = row["plan"].split()[-1]
        parts.append(f"{saved}: {rises}; {sum(exact):.0f} of {len(exact)} facts hidden in a prompt were found")
    return (
        "budget plan: a solver chooses each layer's rows (as a share of the prompt) and dtype: "
        "`include: [units/kv/balanced-shares.yaml]`",
        "the reduction that you ask for, within 5 % at prompts of 128 tokens and more: here 4.95x and 10x KV bytes",
        ". ".join(parts),
        "[kv](docs/benchmarks/kv.md#rules-with-quantised-rows)",
    )


def _uniform(dtype: str, kv: Data, wire: Data, generated: Data, quality: Data) -> tuple[str, str, str, str]:
    """The row of a uniform wire dtype: losses of SmolLM2 by kind of text, of other models; answers that were right."""
    cost = f"SmolLM2-135M: {_by_kind(quality, f'uniform {dtype}')}"
    (*_, (other, prose)) = uniform(wire["rows"], dtype).items()
    cost += f"; {other}: {prose['ratio'] - 1:.1%} ± {prose['error']:.1%} on prose"
    right = {
        row["plan"].removeprefix("uniform "): row["right"] for row in generated["rows"] if row["task"] == "humaneval"
    }
    if dtype in right:
        answers = right[dtype]
        cost += f"; it solves {sum(answers)} of HumanEval's {len(answers)} problems, dense {sum(right['dense'])}"
    return (
        f"quantised wire, {_UNIFORM[dtype]}: `kv: {{method: none, wire_dtype: {dtype}}}`",
        f"{kv['reduction']:.1f}x KV bytes",
        cost,
        "[kv](docs/benchmarks/kv.md)",
    )


def proof(served: Data, faults: Data) -> str:
    """Fidelity by wire dtype and what faults did, one line each."""
    rows, ends = served["rows"], faults["rows"]
    detected, controls = (sum(row[key] for row in rows) for key in ("controls_detected", "controls"))
    worst = max(rows, key=lambda row: row["error"])
    least = min(rows, key=lambda row: row["error"])
    total = {key: sum(row[key] for row in ends) for key in ("sent", "answered", "aborted", "failed", "lost", "wrong")}
    after = {key: sum(row[f"afterwards_{key}"] for row in ends) for key in ("sent", "answered")}
    exact = sum(row["counted"] == row["planned"] for row in rows)
    body = [
        ("served pairs, one for each wire dtype and one of all", len(rows)),
        (
            f"served logprobs against the oracle's, {rows[0]['prompts']} prompts each",
            f"worst error {least['error']:.1e} ({least['wire']}) to {worst['error']:.1e} nats ({worst['wire']}); "
            f"{sum(row['passed'] for row in rows)} of {len(rows)} within what rounding alone does",
        ),
        ("slightly wrong plans that the check must detect", f"{detected} of {controls} detected"),
        ("KV bytes counted on the wire as planned, to the byte", f"{exact} of {len(rows)}"),
        (
            f"{len(ends)} faults: kills, stops, cuts, corruption, overload, hang-ups, a soak",
            f"{total['sent']:,} requests: {total['answered']:,} answered, {total['aborted']:,} hung up by the client, "
            f"{total['failed']:,} failed with a reason, **{total['lost']} hung, {total['wrong']} with wrong text**",
        ),
        ("healthy requests after each fault", f"{after['answered']} of {after['sent']} answered"),
    ]
    caption = (
        f"\n\n`{served['environment']['command']}`, `{faults['environment']['command']}`: each on two cores, no GPU."
    )
    return table(("what was checked", "result"), body) + caption
