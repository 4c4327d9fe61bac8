"""Generated tasks through a genuine pair: sgl-eval gets the pair's own answers, each to its question."""

from __future__ import annotations

import json

import httpx
import pytest

from pdtrim_deploy.cli import main
from pdtrim_deploy.evaluation.generated.endpoint import Endpoint
from pdtrim_deploy.local.own_environment import REPO

pytestmark = [
    pytest.mark.serve,
    pytest.mark.timeout(900),
    pytest.mark.xdist_group("tiny bundle"),
    pytest.mark.skipif(not (REPO / ".venv/evals/pdtrim-stamp.json").is_file(), reason="needs make setup-evals"),
]
ROWS = [{"id": f"q{n}", "problem": f"{'What ' * n * 5}is {n} + {n}?", "expected_answer": str(2 * n)} for n in (1, 2, 3)]
PROMPT = "Solve the following math problem. Make sure to put the answer (and only answer) inside \\boxed{{}}.\n\n{}"


def test_a_pair_answers_what_it_answers_without_the_harness(mixed_pair, mixed_bundle, tmp_path, capsys):
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    words = ["eval", mixed_pair.url, "--tasks", "gsm8k", "--questions", str(tmp_path / "own.jsonl")]
    same = mixed_pair.url.replace("127.0.0.1", "localhost")  # by its own URL a pair is not compared with itself
    words += ["--against", same, "--bundle", str(mixed_bundle.path), "--max-tokens", "12", "--json"]
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code in (0, None)
    (task,) = json.loads(capsys.readouterr().out)["tasks"]
    assert (task["questions"], task["difference"], task["recovery"]["recovery"]) == (3, 0.0, None)  # random weights
    assert Endpoint.at(mixed_pair.url).plan_digest() == mixed_bundle.plan.digest
    texts = []
    for line in (mixed_bundle.reports_dir / "served" / "gsm8k.jsonl").read_text().splitlines():
        row = json.loads(line)
        messages = [{"role": "user", "content": PROMPT.format(row["problem"])}]
        body = {"model": "x", "messages": messages, "max_tokens": 12, "temperature": 0}
        reply = httpx.post(f"{mixed_pair.url}/v1/chat/completions", json=body, timeout=120, trust_env=False).json()
        texts.append(reply["choices"][0]["message"]["content"])
        assert row["pair"]["text"] == row["dense"]["text"] == texts[-1]
    assert len(set(texts)) == len(ROWS)
    assert (mixed_bundle.reports_dir / "served.json").is_file()
