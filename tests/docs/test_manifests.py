"""Every object against Kubernetes' own schemas (of the package kubernetes-validate), strictly; offline."""

from __future__ import annotations

import pytest

from pdtrim_deploy.manifests import BundleAt, Options, Served, kubernetes

kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="needs the docs environment")
# Not of Kubernetes itself, so no schema: tested by structure in tests/manifests.
OTHERS = ("Kustomization", "PodMonitor")


@pytest.mark.parametrize("bundle", ["pvc:claim/path", "oci:registry.example/bundle:1", "host:/srv/bundle"])
def test_against_the_schemas(bundle: str) -> None:
    options = Options(prefill=2, decode=6, gpus=2, bundle=BundleAt.parse(bundle), rdma="rdma/hca")
    kinds = set()
    for documents in kubernetes(Served("m", "0" * 64, "bfloat16", True), options).values():
        for one in documents:
            kinds.add(one["kind"])
            if one["kind"] not in OTHERS:
                kubernetes_validate.validate(one, "1.37", strict=True)
    assert kinds - set(OTHERS) >= {"Deployment", "Service", "Role", "NetworkPolicy", "ConfigMap", "PodDisruptionBudget"}


def test_a_misspelt_key_would_be_seen() -> None:
    made = kubernetes(Served("m", "0" * 64, "bfloat16", True), Options())["prefill.yaml"][0]
    made["spec"]["template"]["spec"]["containers"][0]["readinesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(made, "1.37", strict=True)
