"""The harness's own adapter for transformers, as reference: its results of local tasks and their questions, as JSON.

.venv/evals/bin/python hflm.py SITE MODEL TASKS_FOLDER TASK...   # SITE: site-packages that hold torch and transformers
"""

import json
import os
import sys

site, model, folder, *tasks = sys.argv[1:]
sys.path.append(site)
os.chdir(folder)
channel = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)

import torch  # noqa: E402
from lm_eval import simple_evaluate  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

torch.set_num_threads(1)
results = simple_evaluate(
    model=HFLM(pretrained=model, device="cpu", dtype="float32", batch_size=3),
    tasks=tasks,
    task_manager=TaskManager(include_path=folder, include_defaults=False),
    bootstrap_iters=0,
    log_samples=True,
)
json.dump({key: results[key] for key in ("samples", "results")}, channel, default=str)
channel.close()
