"""The estimate of a large graph's memory against what the process that builds it takes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pdtrim_deploy.models.config import read_config
from pdtrim_deploy.models.weights import ModelSizes
from pdtrim_deploy.pipeline.engine_costs import graph_memory

BUILD = Path(__file__).with_name("measured_graph.py")
PROGRAM_FILES = 0.12e9  # bytes of libraries, which are pages of files
SIZES = {
    "num_hidden_layers": 6, "hidden_size": 1536, "intermediate_size": 2560, "num_attention_heads": 12,
    "num_key_value_heads": 4, "head_dim": 128,
}  # fmt: skip


def test_a_large_graph_is_built_without_the_whole_model(tiny_model, make_stages, tmp_path):
    folder = tiny_model(tmp_path / "m", **SIZES)
    stages = make_stages(folder, tmp_path / "stages", alone=None)
    command = [sys.executable, BUILD, stages / "prefill", tmp_path / "engine"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    measured = int(done.stdout.split()[-1]) + PROGRAM_FILES
    sizes = ModelSizes.of(read_config(folder / "config.json"))
    assert graph_memory(sizes) == pytest.approx(measured, rel=0.2)
    assert measured < 0.5e9 + 4 * sizes.total, "less than the model in float32, of which one block is there at a time"
