"""The manifests, offline: rendered by Kustomize itself (kubectl, of a package), checked by Kubernetes' schemas."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pdtrim_deploy.manifests import BundleAt, Options, Served, kubernetes

kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="needs the docs environment")
ROOT = Path(__file__).parents[2]
KUBECTL = Path(sys.executable).parent / "kubectl"
SERVED = Served("m", "0" * 64, "bfloat16", True)
# Not of Kubernetes itself, so no schema: tested by structure in tests/manifests.
OTHERS = ("Kustomization", "PodMonitor")


def kustomize(folder: Path) -> list[dict]:
    """The objects that `kubectl apply -k` would send."""
    done = subprocess.run([KUBECTL, "kustomize", folder], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return list(yaml.safe_load_all(done.stdout))


def write(folder: Path, files: dict[str, list[dict]]) -> Path:
    folder.mkdir()
    for name, documents in files.items():
        (folder / name).write_text(yaml.safe_dump_all(documents))
    return folder


def validate(objects: list[dict]) -> None:
    for item in objects:
        if item["kind"] not in OTHERS:
            kubernetes_validate.validate(item, "1.37", strict=True)


def named(objects: list[dict], kind: str, name: str) -> dict:
    (match,) = (item for item in objects if (item["kind"], item["metadata"]["name"]) == (kind, name))
    return match


@pytest.mark.parametrize("bundle", ["pvc:claim/path", "oci:registry.example/bundle:1", "host:/srv/bundle"])
def test_kustomize_renders_objects_that_the_schemas_allow(tmp_path: Path, bundle: str) -> None:
    rdma = {"rdma": "rdma/hca", "transport": "pdtrim_nixl", "transport_options": {"accept_unauthenticated": True}}
    options = Options(prefill=2, decode=6, tp_prefill=2, tp_decode=1, bundle=BundleAt.parse(bundle), **rdma)
    files = kubernetes(SERVED, options)
    validate([item for documents in files.values() for item in documents])
    objects = kustomize(write(tmp_path / "base", files))
    validate(objects)
    written = {
        (item["kind"], item["metadata"]["name"]) for name, docs in files.items() if name[0] != "k" for item in docs
    }
    assert {(item["kind"], item["metadata"]["name"]) for item in objects} == written
    assert {kind for kind, _ in written} >= {"Deployment", "Service", "Role", "NetworkPolicy", "PodDisruptionBudget"}
    for item in objects:
        assert item["metadata"]["labels"]["app.kubernetes.io/part-of"] == "pdtrim"
        if item["kind"] == "Deployment":  # a selector cannot be changed later: only our own labels are in it
            assert "app.kubernetes.io/part-of" not in item["spec"]["selector"]["matchLabels"]


def test_the_base_that_is_shipped_renders() -> None:
    objects = kustomize(ROOT / "deploy" / "base")
    validate(objects)
    assert named(objects, "Deployment", "pdtrim-decode")["spec"]["replicas"] == 6


def test_an_overlay_stands_on_it(tmp_path: Path) -> None:
    write(tmp_path / "base", kubernetes(SERVED, Options(prefill=2, decode=6)))
    overlay = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": ["../base"],
        "namespace": "llm",
        "namePrefix": "a-",
        "images": [{"name": "pdtrim-serve", "newName": "registry.example/pdtrim", "newTag": "7"}],
        "replicas": [{"name": "pdtrim-decode", "count": 3}],
        "patches": [
            {
                "target": {"kind": "Deployment", "labelSelector": "app.kubernetes.io/name=pdtrim"},
                "patch": '[{"op": "add", "path": "/spec/template/spec/nodeSelector", "value": {"gpu": "h100"}}]',
            }
        ],
    }
    objects = kustomize(write(tmp_path / "overlay", {"kustomization.yaml": [overlay]}))
    validate(objects)
    decode = named(objects, "Deployment", "a-pdtrim-decode")
    assert decode["spec"]["replicas"] == 3
    assert decode["metadata"]["namespace"] == "llm"
    pod = decode["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {"gpu": "h100"}
    assert pod["containers"][0]["image"] == "registry.example/pdtrim:7"
    router = named(objects, "Deployment", "a-pdtrim-router")["spec"]["template"]["spec"]
    assert router["serviceAccountName"] == named(objects, "RoleBinding", "a-pdtrim-router")["subjects"][0]["name"]
    assert router["volumes"][0]["configMap"]["name"] == "a-pdtrim-router-probe"


def test_what_is_wrong_would_be_seen(tmp_path: Path) -> None:
    files = kubernetes(SERVED, Options())
    files["prefill.yaml"][0]["spec"]["template"]["spec"]["containers"][0]["readinesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        validate(files["prefill.yaml"])
    del files["decode.yaml"]
    done = subprocess.run([KUBECTL, "kustomize", write(tmp_path / "b", files)], capture_output=True, check=False)
    assert done.returncode == 1
    assert b"decode.yaml" in done.stderr
