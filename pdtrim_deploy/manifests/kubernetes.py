"""SGLang PD on Kubernetes: prefill and decode as workloads of their own, the router with service discovery.

A Kustomize base: add what your cluster needs (node selectors, tolerations, registries) in an overlay.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pdtrim_deploy.manifests.options import (
    BOOTSTRAP_PORT,
    BUNDLE_MOUNT,
    GPUS,
    GRACE_S,
    HTTP_PORT,
    ROUTER_ARGUMENTS,
    ROUTER_METRICS_PORT,
    ROUTER_PORT,
    SECRET_FOLDER,
    SECRET_KEY,
    USER_ID,
    Options,
    Served,
    worker_arguments,
    worker_environment,
)
from pdtrim_deploy.plan import STAGES, Stage

Manifest = dict[str, Any]
APP, ROLE, PLAN = "app.kubernetes.io/name", "pdtrim/role", "pdtrim/plan"
START_S = 1800  # limit for a worker's start; the router's pod becomes ready only after it
READY = Path(__file__).with_name("ready.py")


def kubernetes(served: Served, options: Options) -> dict[str, list[Manifest]]:
    """Manifests by file name; `kustomization.yaml` names the others."""
    files = {f"{stage}.yaml": _worker(served, options, stage) for stage in STAGES}
    files["router.yaml"] = _router(served, options)
    files["network-policy.yaml"] = _network_policies(options)
    files["pod-monitor.yaml"] = [_pod_monitor(options)]
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": list(files),
        "labels": [{"pairs": {"app.kubernetes.io/part-of": options.name}, "includeSelectors": False}],
    }
    return {"kustomization.yaml": [kustomization], **files}


def secret_name(options: Options) -> str:
    """Name of the Secret that the operator creates, with the key `kv`."""
    return f"{options.name}-{SECRET_KEY}"


def _worker(served: Served, options: Options, stage: Stage) -> list[Manifest]:
    ports = [{"name": "http", "containerPort": HTTP_PORT}]
    annotations = {"pdtrim/plan-digest": served.plan_digest}
    if stage == "prefill":
        ports.append({"name": "bootstrap", "containerPort": BOOTSTRAP_PORT})
        annotations["sglang.ai/bootstrap-port"] = str(BOOTSTRAP_PORT)  # the router reads it
    resources = {GPUS: str(options.gpus(stage)), "memory": options.memory}
    resources |= {options.rdma: "1"} if options.rdma else {}
    container = {
        "name": "sglang",
        "image": options.image,
        "command": [word.replace("$", "$$") for word in worker_arguments(served, options, stage)],  # no variables
        "env": [
            *({"name": key, "value": value} for key, value in worker_environment(served).items()),
            {"name": "SGLANG_HOST_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
        ],
        "ports": ports,
        "resources": {"requests": {**resources, "cpu": "4"}, "limits": resources},
        # SGLang's /health makes the worker generate a token, unless other answers are coming out of it anyway.
        "startupProbe": _health(period=10, failures=START_S // 10),
        "readinessProbe": _health(period=30, failures=2),
        "livenessProbe": _health(period=60, failures=5),
        "securityContext": _confined(),
        "volumeMounts": [
            {"name": "bundle", "mountPath": BUNDLE_MOUNT, "readOnly": True}
            | ({"subPath": options.bundle.subpath} if options.bundle.subpath else {}),
            {"name": "shm", "mountPath": "/dev/shm"},
            {"name": "tmp", "mountPath": "/tmp"},
            {"name": "secret", "mountPath": SECRET_FOLDER, "readOnly": True},
        ],
    }
    volumes = [
        {"name": "bundle", **options.bundle.volume},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "8Gi"}},
        {"name": "tmp", "emptyDir": {}},
        {"name": "secret", "secret": {"secretName": secret_name(options), "defaultMode": 0o440}},
    ]
    pod = {**_pod_basics(), "containers": [container], "volumes": volumes}
    labels = _labels(options, stage) | {PLAN: served.plan}
    return [
        _deployment(options, stage, options.replicas(stage), labels, annotations, pod),
        _budget(options, stage),
    ]


def _router(served: Served, options: Options) -> list[Manifest]:
    name = f"{options.name}-router"
    discovery = ["--service-discovery", "--service-discovery-port", str(HTTP_PORT)]
    discovery += ["--service-discovery-namespace", "$(POD_NAMESPACE)"]
    for stage in STAGES:  # with the plan: during a rollout no pair mixes two plans
        pairs = _labels(options, stage) | {PLAN: served.plan}
        discovery += [f"--{stage}-selector", *(f"{key}={value}" for key, value in pairs.items())]
    url = f"http://127.0.0.1:{ROUTER_PORT}"
    container = {
        "name": "router",
        "image": options.image,
        "command": [*ROUTER_ARGUMENTS, *discovery],
        "env": [
            {"name": "POD_NAMESPACE", "valueFrom": {"fieldRef": {"fieldPath": "metadata.namespace"}}},
            {"name": "HOME", "value": "/tmp"},
        ],
        "ports": [
            {"name": "http", "containerPort": ROUTER_PORT},
            {"name": "metrics", "containerPort": ROUTER_METRICS_PORT},
        ],
        "resources": {"requests": {"cpu": "1", "memory": "1Gi"}, "limits": {"memory": "4Gi"}},
        "readinessProbe": {
            "exec": {"command": ["python3", "/probe/ready.py", f"{url}/generate"]},
            "periodSeconds": 30,
            "timeoutSeconds": 30,
            "failureThreshold": 2,
        },
        "livenessProbe": {"httpGet": {"path": "/liveness", "port": "http"}, "periodSeconds": 20, "timeoutSeconds": 5},
        "securityContext": _confined(),
        "volumeMounts": [{"name": "probe", "mountPath": "/probe"}, {"name": "tmp", "mountPath": "/tmp"}],
    }
    volumes = [{"name": "probe", "configMap": {"name": f"{name}-probe"}}, {"name": "tmp", "emptyDir": {}}]
    pod = _pod_basics() | {"automountServiceAccountToken": True, "serviceAccountName": name}
    pod |= {"containers": [container], "volumes": volumes}
    rule = {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]}
    role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": name}
    ports = [{"name": "http", "port": ROUTER_PORT, "targetPort": "http"}]
    return [
        _object("v1", "ServiceAccount", name, options),
        _object("rbac.authorization.k8s.io/v1", "Role", name, options) | {"rules": [rule]},
        _object("rbac.authorization.k8s.io/v1", "RoleBinding", name, options)
        | {"roleRef": role, "subjects": [{"kind": "ServiceAccount", "name": name}]},
        _object("v1", "ConfigMap", f"{name}-probe", options) | {"data": {"ready.py": READY.read_text()}},
        _deployment(options, "router", 1, _labels(options, "router"), {"pdtrim/plan-digest": served.plan_digest}, pod),
        _object("v1", "Service", name, options) | {"spec": {"selector": _labels(options, "router"), "ports": ports}},
    ]


def _network_policies(options: Options) -> list[Manifest]:
    """Workers talk to each other and the router, clients to the router alone; metrics to the monitoring namespace."""
    pods = {"podSelector": {"matchLabels": {APP: options.name}}}
    monitoring = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": options.monitoring}}}
    dns = {"ports": [{"port": 53, "protocol": protocol} for protocol in ("UDP", "TCP")]}
    workers = {"matchExpressions": [{"key": ROLE, "operator": "In", "values": list(STAGES)}]}
    workers["matchLabels"] = {APP: options.name}  # type: ignore[assignment]
    spec_workers = {
        "podSelector": workers,
        "policyTypes": ["Ingress", "Egress"],
        "ingress": [{"from": [pods]}, {"from": [monitoring], "ports": [{"port": HTTP_PORT}]}],
        "egress": [{"to": [pods]}, dns],
    }
    spec_router = {
        "podSelector": {"matchLabels": _labels(options, "router")},
        "policyTypes": ["Ingress", "Egress"],
        "ingress": [
            {"ports": [{"port": ROUTER_PORT}]},
            {"from": [monitoring], "ports": [{"port": ROUTER_METRICS_PORT}]},
        ],
        "egress": [{"to": [pods]}, dns, {"ports": [{"port": 443}, {"port": 6443}]}],  # Kubernetes' own API
    }
    kind = ("networking.k8s.io/v1", "NetworkPolicy")
    return [
        _object(*kind, f"{options.name}-workers", options) | {"spec": spec_workers},
        _object(*kind, f"{options.name}-router", options) | {"spec": spec_router},
    ]


def _pod_monitor(options: Options) -> Manifest:
    """For the Prometheus operator: workers on their HTTP port, the router on its metrics port."""
    relabel = [{"sourceLabels": [f"__meta_kubernetes_pod_label_{ROLE.replace('/', '_')}"], "targetLabel": "role"}]
    drop = {"sourceLabels": ["role"], "regex": "router"}
    worker, router = drop | {"action": "drop"}, drop | {"action": "keep"}
    return _object("monitoring.coreos.com/v1", "PodMonitor", options.name, options) | {
        "spec": {
            "selector": {"matchLabels": {APP: options.name}},
            "podMetricsEndpoints": [
                {"port": "http", "path": "/metrics", "interval": "15s", "relabelings": [*relabel, worker]},
                {"port": "metrics", "path": "/metrics", "interval": "15s", "relabelings": [*relabel, router]},
            ],
        }
    }


def _deployment(
    options: Options, role: str, replicas: int, labels: dict[str, str], annotations: dict[str, str], pod: Manifest
) -> Manifest:
    return _object("apps/v1", "Deployment", f"{options.name}-{role}", options) | {
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": _labels(options, role)},
            "progressDeadlineSeconds": START_S + 600,
            # A new pod cannot use a GPU that an old pod holds: replace one at a time, the old one first.
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}},
            "template": {"metadata": {"labels": labels, "annotations": annotations}, "spec": pod},
        }
    }


def _budget(options: Options, role: str) -> Manifest:
    return _object("policy/v1", "PodDisruptionBudget", f"{options.name}-{role}", options) | {
        "spec": {"maxUnavailable": 1, "selector": {"matchLabels": _labels(options, role)}}
    }


def _object(version: str, kind: str, name: str, options: Options) -> Manifest:
    return {"apiVersion": version, "kind": kind, "metadata": {"name": name, "labels": {APP: options.name}}}


def _labels(options: Options, role: str) -> dict[str, str]:
    return {APP: options.name, ROLE: role}


def _pod_basics() -> Manifest:
    ids = {"runAsUser": USER_ID, "runAsGroup": USER_ID, "fsGroup": USER_ID}
    secure = {"runAsNonRoot": True, **ids, "seccompProfile": {"type": "RuntimeDefault"}}
    return {
        "automountServiceAccountToken": False,
        "securityContext": secure,
        "terminationGracePeriodSeconds": GRACE_S,
    }


def _confined() -> Manifest:
    """No capability is added: Kubernetes puts it into the bounding set, from which a user that is not root gets none.

    So IPC_LOCK would not let RDMA register memory beyond the container runtime's memlock (`deploy/README.md`).
    """
    return {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}


def _health(period: int, failures: int) -> Manifest:
    probe = {"httpGet": {"path": "/health", "port": "http"}, "periodSeconds": period}
    return probe | {"timeoutSeconds": 25, "failureThreshold": failures}
