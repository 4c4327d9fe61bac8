"""A model with sinks is refused on a CPU where SGLang would compute its attention with AMX."""

import sys

import pytest
from bare_bundle import make_bundle

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.serving import ServeEnvironment, WorkerOptions, cluster_of
from pdtrim_deploy.serving.sinks import require_torch_attention

AMX, PLAIN = frozenset({"avx512f", "amx_tile"}), frozenset({"avx512f"})
KERNELS = """
import torch
library = torch.library.Library("sgl_kernel", "DEF")
library.define("convert_weight_packed(Tensor weight) -> Tensor")
"""


@pytest.fixture
def serve(tmp_path):
    """`serve(source)`: an environment whose Python finds a module sgl_kernel of that source, or none."""

    def make(source):
        if source is not None:
            (tmp_path / "sgl_kernel.py").write_text(source)
        python = tmp_path / "python"
        python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path} exec {sys.executable} "$@"\n')
        python.chmod(0o755)
        return ServeEnvironment(python)

    return make


@pytest.mark.parametrize(("features", "source"), [(AMX, None), (AMX, "def rmsnorm(): ..."), (PLAIN, KERNELS)])
def test_where_sglang_takes_torch_native_sinks_are_served(features, source, serve):
    """Without AMX, and beside a stand-in of the kernels' name, as tools/cpu_stubs."""
    require_torch_attention(serve(source), "GptOssForCausalLM", features)


def test_where_sglang_takes_amx_they_are_refused(serve):
    with pytest.raises(
        UserError, match=r"GptOssForCausalLM has attention sinks.* intel_amx .*serve this bundle on GPUs"
    ):
        require_torch_attention(serve(KERNELS), "GptOssForCausalLM", AMX)


@pytest.mark.parametrize(("architecture", "device", "refused"), [
    ("GptOssForCausalLM", "cpu", True), ("GptOssForCausalLM", "cuda", False), ("LlamaForCausalLM", "cpu", False),
])  # fmt: skip
def test_a_bundle_is_refused_before_its_cluster_is_made(architecture, device, refused, serve, tmp_path, monkeypatch):
    monkeypatch.setattr("pdtrim_deploy.serving.sinks.cpu_features", lambda: AMX)
    bundle = make_bundle(tmp_path / "bundle", architecture=architecture)
    options = WorkerOptions(device=device)
    if refused:
        with pytest.raises(UserError, match="has attention sinks"):
            cluster_of(bundle, options=options, environment=serve(KERNELS), log_dir=tmp_path, gpus=2)
    else:
        assert cluster_of(bundle, options=options, environment=serve(KERNELS), log_dir=tmp_path, gpus=2).spec.decode
