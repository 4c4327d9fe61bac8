"""Three small tasks on local data, a kind of request each: YAML and JSON lines for `--include-path`."""

import json
from pathlib import Path

import yaml

WORDS = ["river", "stone", "market", "window", "garden", "letter", "silver", "morning", "captain", "winter"]
TASKS = ("tiny_choice", "tiny_rolling", "tiny_text")


def write_tasks(folder: Path, questions: int = 6, paragraph: int = 40) -> Path:
    """The tasks, with `questions` questions each; the texts of `tiny_rolling` grow by `paragraph` words."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for n in range(questions):
        # contexts of few lengths, so that some share a batch; answers of one byte and of many
        context = " ".join(WORDS[(n // 2 + k) % 10] for k in range(6 + n % 3))
        choices = [WORDS[(n + k) % 10][: 1 + 3 * k] for k in range(4)]
        text = " ".join(WORDS[(n * k + k) % 10] for k in range(paragraph * n + 3))
        rows.append({"context": context, "choices": choices, "label": n % 4, "text": text, "answer": choices[0]})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}}, "test_split": "test"}
    metrics = ("acc", "acc_norm")
    choice = {"output_type": "multiple_choice", "doc_to_text": "{{context}}", "doc_to_target": "label"}
    choice |= {"doc_to_choice": "choices", "metric_list": [{"metric": m} for m in metrics]}
    rolling = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"}
    rolling |= {"metric_list": [{"metric": "word_perplexity"}]}
    text = {"output_type": "generate_until", "doc_to_text": "{{context}}", "doc_to_target": "{{answer}}"}
    text |= {"generation_kwargs": {"until": ["e", "\x90"], "max_gen_toks": 24, "do_sample": False}}
    text |= {"metric_list": [{"metric": "exact_match"}]}
    for name, task in zip(TASKS, (choice, rolling, text), strict=True):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **common, **task}))
    return folder
