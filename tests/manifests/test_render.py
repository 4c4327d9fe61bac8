"""Output of `deploy render`: properties that matter in a cluster, and that deploy/ is up to date."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml
from commandline import run

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.manifests import BundleAt, Options, Served, compose, kubernetes, yaml_text
from pdtrim_deploy.manifests.dashboard import PANELS
from pdtrim_deploy.plan import STAGES, LinearStates, ModelShape, PDPlan

ROOT = Path(__file__).parents[2]
SERVED = Served("m", "ab" * 32, "bfloat16", sparse=True)
OVERRIDE = "--json-model-override-args"
NIXL = {"transport": "pdtrim_nixl", "transport_options": {"accept_unauthenticated": True}}
DENSE = Served("m", "cd" * 32, "bfloat16", sparse=False)


def objects(served: Served = SERVED, **choices) -> dict[tuple[str, str], dict]:
    files = kubernetes(served, Options(**choices))
    return {(o["kind"], o["metadata"]["name"]): o for f, docs in files.items() if f[0] != "k" for o in docs}


def container(workload: dict) -> dict:
    (only,) = workload["spec"]["template"]["spec"]["containers"]
    return only


def option(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]


def test_stages_are_workloads_of_their_own() -> None:
    rendered = objects(prefill=2, decode=6, tp_prefill=4, tp_decode=2)
    for stage, count, gpus in (("prefill", 2, "4"), ("decode", 6, "2")):
        workload = rendered["Deployment", f"pdtrim-{stage}"]
        command = container(workload)["command"]
        assert workload["spec"]["replicas"] == count
        assert option(command, "--disaggregation-mode") == stage
        assert option(command, "--model-path") == f"/bundle/{stage}"
        assert option(command, "--tp-size") == gpus
        assert container(workload)["resources"]["limits"]["nvidia.com/gpu"] == gpus


def test_workers_share_a_secret_that_no_file_holds() -> None:
    rendered = objects()
    assert not any(kind == "Secret" for kind, _ in rendered)
    for stage in ("prefill", "decode"):
        override = json.loads(option(container(rendered["Deployment", f"pdtrim-{stage}"])["command"], OVERRIDE))
        volumes = rendered["Deployment", f"pdtrim-{stage}"]["spec"]["template"]["spec"]["volumes"]
        assert {"name": "secret", "secret": {"secretName": "pdtrim-kv", "defaultMode": 0o440}} in volumes
        assert override == {"pdtrim_secret_file": "/run/secrets/kv"}
    services = compose(SERVED, Options(bundle=BundleAt("host", "/srv/b")))["services"]
    assert {name for name, service in services.items() if service.get("secrets") == ["kv"]} == {"prefill-0", "decode-0"}


def test_only_sparse_plans_choose_decodes_attention() -> None:
    sparse, dense = (container(objects(s)["Deployment", "pdtrim-decode"])["command"] for s in (SERVED, DENSE))
    assert option(sparse, "--attention-backend") == "triton"
    assert "--disable-cuda-graph" not in sparse
    assert "--attention-backend" not in dense
    prefill = container(objects()["Deployment", "pdtrim-prefill"])["command"]
    assert "--attention-backend" not in prefill
    assert ["--disable-hybrid-swa-memory" in command for command in (sparse, dense, prefill)] == [True, False, False]


@pytest.mark.parametrize(("dtype", "precision"), [("float32", "ieee"), ("bfloat16", None)])
def test_float32_is_multiplied_in_float32(dtype: str, precision: str | None) -> None:
    served = Served("m", "ab" * 32, dtype, sparse=False)
    services = compose(served, Options(bundle=BundleAt("host", "/srv/b")))["services"]
    for stage in STAGES:
        pod = container(objects(served)["Deployment", f"pdtrim-{stage}"])
        variables = {variable["name"]: variable.get("value") for variable in pod["env"]}
        assert variables.get("TRITON_F32_DEFAULT") == precision
        assert services[f"{stage}-0"]["environment"].get("TRITON_F32_DEFAULT") == precision
        assert ("--attention-backend" in pod["command"]) == (dtype == "float32")


def test_convolutions_are_in_the_plans_dtype() -> None:
    """Of models with linear attention, which SGLang would have in bfloat16."""
    states = LinearStates(blocks=(0,), key_heads=4, key_dim=8, value_heads=8, value_dim=8, conv_columns=3)
    shape = ModelShape(
        architecture="X", fingerprint="f", num_blocks=2, num_kv_heads=2, head_dim=8, kv_dtype="float16", states=states
    )
    for conv_dtype, columns in (("float16", "float16"), ("bfloat16", None)):
        kept = states.model_copy(update={"conv_dtype": conv_dtype})
        served = Served.of("m", PDPlan.dense(shape.model_copy(update={"states": kept})))
        pod = container(objects(served)["Deployment", "pdtrim-decode"])
        variables = {variable["name"]: variable.get("value") for variable in pod["env"]}
        assert variables.get("SGLANG_MAMBA_CONV_DTYPE") == columns


def test_both_stages_have_the_pages_that_every_gpu_can_use() -> None:
    for stage in STAGES:
        assert option(container(objects()["Deployment", f"pdtrim-{stage}"])["command"], "--page-size") == "64"


def test_the_router_finds_the_pods_of_its_plan_alone() -> None:
    rendered = objects()
    command = container(rendered["Deployment", "pdtrim-router"])["command"]
    for stage in ("prefill", "decode"):
        start = command.index(f"--{stage}-selector") + 1
        end = next((n for n in range(start, len(command)) if command[n].startswith("--")), len(command))
        selector = dict(pair.split("=") for pair in command[start:end])
        labels = rendered["Deployment", f"pdtrim-{stage}"]["spec"]["template"]["metadata"]["labels"]
        assert selector == labels
        assert selector["pdtrim/plan"] == ("ab" * 32)[:32]
        other = objects(DENSE)["Deployment", f"pdtrim-{stage}"]["spec"]["template"]["metadata"]["labels"]
        assert selector != other
    assert option(command, "--service-discovery-port") == "30000"
    rule = rendered["Role", "pdtrim-router"]["rules"]
    assert rule == [{"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]}]


def test_selectors_match_their_pods_and_never_change_with_the_plan() -> None:
    for served in (SERVED, DENSE):
        for (kind, _), rendered in objects(served).items():
            if kind == "Deployment":
                selector = rendered["spec"]["selector"]["matchLabels"]
                assert selector.items() <= rendered["spec"]["template"]["metadata"]["labels"].items()
                assert "pdtrim/plan" not in selector  # a Deployment's selector cannot be changed


def test_the_router_may_finish_requests_before_kubernetes_kills_it() -> None:
    """It waits for requests under way, 180 s unless told otherwise; Kubernetes, unless told otherwise, 30 s."""
    rendered = objects()
    router = rendered["Deployment", "pdtrim-router"]
    waits = int(option(container(router)["command"], "--shutdown-grace-period-secs"))
    pods = {kind: rendered["Deployment", f"pdtrim-{kind}"]["spec"]["template"]["spec"] for kind in ("router", *STAGES)}
    assert all(waits < pod["terminationGracePeriodSeconds"] for pod in pods.values())


def test_a_rollout_is_given_as_long_as_its_workers_may_take_to_start() -> None:
    """Kubernetes calls one failed after 600 s; the router's pod is ready only when workers are."""
    rendered = objects()
    startup = container(rendered["Deployment", "pdtrim-decode"])["startupProbe"]
    takes = startup["periodSeconds"] * startup["failureThreshold"]
    for role in ("router", *STAGES):
        assert rendered["Deployment", f"pdtrim-{role}"]["spec"]["progressDeadlineSeconds"] > takes


def test_pods_are_confined_and_ports_are_named() -> None:
    for (kind, _), workload in objects(rdma="rdma/hca", **NIXL).items():
        if kind != "Deployment":
            continue
        pod, inside = workload["spec"]["template"]["spec"], container(workload)
        assert pod["securityContext"]["runAsNonRoot"]
        assert not inside["securityContext"]["allowPrivilegeEscalation"]
        assert inside["securityContext"]["readOnlyRootFilesystem"]
        assert inside["securityContext"]["capabilities"] == {"drop": ["ALL"]}, "one that is added has no effect"
        mounted, volumes = {v["name"] for v in inside["volumeMounts"]}, {v["name"] for v in pod["volumes"]}
        assert mounted == volumes
        names = {port["name"] for port in inside["ports"]}
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            if "httpGet" in inside.get(probe, {}):
                assert inside[probe]["httpGet"]["port"] in names
    rendered = objects(rdma="rdma/hca", **NIXL)
    assert container(rendered["Deployment", "pdtrim-decode"])["resources"]["limits"]["rdma/hca"] == "1"
    assert "rdma/hca" not in json.dumps(objects()["Deployment", "pdtrim-decode"])
    with pytest.raises(UserError, match=r"--rdma is nvidia.com/gpu, of which"):  # it would replace their number
        Options(rdma="nvidia.com/gpu", tp_prefill=4, **NIXL)


def test_the_routers_probe_wants_a_second_token() -> None:
    import http.server
    import subprocess
    import threading

    script = objects()["ConfigMap", "pdtrim-router-probe"]["data"]["ready.py"]

    class Answer(http.server.BaseHTTPRequestHandler):
        tokens = 2

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert request["sampling_params"]["max_new_tokens"] == 2
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"meta_info": {"completion_tokens": self.tokens}}).encode())

        def log_message(self, *_: object) -> None: ...

    with http.server.HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        command = [sys.executable, "-c", script, f"http://127.0.0.1:{server.server_port}/generate"]
        assert subprocess.run(command, check=False).returncode == 0
        Answer.tokens = 1
        assert subprocess.run(command, check=False, capture_output=True).returncode == 1
        server.shutdown()
    assert subprocess.run(command, check=False, capture_output=True).returncode == 1


@pytest.mark.parametrize(
    ("text", "volume"),
    [
        ("pvc:c", {"persistentVolumeClaim": {"claimName": "c", "readOnly": True}}),
        ("oci:reg/b:1", {"image": {"reference": "reg/b:1", "pullPolicy": "IfNotPresent"}}),
        ("host:/srv/b", {"hostPath": {"path": "/srv/b", "type": "Directory"}}),
    ],
)
def test_where_the_bundle_comes_from(text: str, volume: dict) -> None:
    pod = objects(bundle=BundleAt.parse(text))["Deployment", "pdtrim-decode"]["spec"]["template"]["spec"]
    assert {"name": "bundle", **volume} in pod["volumes"]


def test_a_claims_subpath_is_mounted() -> None:
    mounts = container(objects(bundle=BundleAt.parse("pvc:c/a/b"))["Deployment", "pdtrim-decode"])["volumeMounts"]
    assert {"name": "bundle", "mountPath": "/bundle", "readOnly": True, "subPath": "a/b"} in mounts


def test_bad_choices_are_refused() -> None:
    for text in ("pvc:", "host:relative", "s3:x", "plain"):
        with pytest.raises(UserError, match="--bundle-from is"):
            BundleAt.parse(text)
    with pytest.raises(UserError, match="--name is 'A'"):
        Options(name="A")
    with pytest.raises(UserError, match="--rdma is 'hca'"):
        Options(rdma="hca")
    with pytest.raises(UserError, match="give --bundle-from host"):
        compose(SERVED, Options())
    options = Options(bundle=BundleAt("host", "/b"), rdma="rdma/hca", **NIXL)
    with pytest.raises(UserError, match="leave it out with --to compose"):
        compose(SERVED, options)
    with pytest.raises(UserError, match=r"--rdma is of no use to --transport pdtrim_tcp; valid with it: pdtrim_nixl, "):
        Options(rdma="rdma/hca")
    with pytest.raises(UserError, match="say so: --transport-option accept_unauthenticated=true"):
        Options(transport="pdtrim_nixl")
    for wrong in ("lots", "64 Gi", "64GB", "0", "-1Gi", "64Gi\n"):
        with pytest.raises(UserError, match="--memory is"):
            Options(memory=wrong)
    for wrong in ("Monitoring", "a.b", "-a", "a" * 64, ""):
        with pytest.raises(UserError, match="--monitoring is"):
            Options(monitoring=wrong)
    for right in ("64Gi", "1.5Ti", "500M", "68719476736"):
        assert Options(memory=right).memory == right


def test_workers_are_told_their_transport() -> None:
    def transports(**choices) -> list[tuple[str, dict]]:
        commands = [container(objects(**choices)["Deployment", f"pdtrim-{stage}"])["command"] for stage in STAGES]
        return [(option(c, "--disaggregation-transfer-backend"), json.loads(option(c, OVERRIDE))) for c in commands]

    secret = {"pdtrim_secret_file": "/run/secrets/kv"}
    assert transports() == [("pdtrim_tcp", secret)] * 2
    assert transports(**NIXL) == [("pdtrim_nixl", secret | {"pdtrim_transport": {"accept_unauthenticated": True}})] * 2
    mooncake = NIXL | {"transport": "pdtrim_mooncake", "rdma": "rdma/hca"}
    rdma = {"protocol": "rdma", "accept_unauthenticated": True}
    assert transports(**mooncake) == [("pdtrim_mooncake", secret | {"pdtrim_transport": rdma})] * 2


def test_each_stage_is_given_its_own_arguments_last() -> None:
    """Where SGLang's parser lets them win over ours."""
    more = {"prefill_args": ("--page-size", "16"), "decode_args": ("--max-running-requests", "64")}
    services = compose(SERVED, Options(bundle=BundleAt("host", "/srv/b"), **more))["services"]
    for stage in STAGES:
        commands = [container(objects(**more)["Deployment", f"pdtrim-{stage}"])["command"]]
        commands.append(services[f"{stage}-0"]["command"])
        for command in commands:
            assert tuple(command[-2:]) == more[f"{stage}_args"]
            assert "--max-running-requests" not in command[:-2]
    for name in more:
        with pytest.raises(UserError, match=f"--{name.replace('_', '-')} has --tp: say --tp-prefill"):
            Options(**{name: ("--tp", "2")})


def test_dollars_in_arguments_are_no_variables() -> None:
    """Compose expands `$NAME`, Kubernetes `$(NAME)`; both make one dollar of two, in names or not."""
    more = {"prefill_args": ("--log-requests-target", "/var/$HOST/$(POD)/$$")}
    services = compose(SERVED, Options(bundle=BundleAt("host", "/srv/$b"), **more))["services"]
    assert services["prefill-0"]["command"][-1] == "/var/$$HOST/$$(POD)/$$$$"
    assert services["prefill-0"]["volumes"][0]["source"] == "/srv/$$b"
    assert container(objects(**more)["Deployment", "pdtrim-prefill"])["command"][-1] == "/var/$$HOST/$$(POD)/$$$$"


def test_words_that_others_read_as_numbers_are_quoted() -> None:
    """PyYAML knows YAML 1.1 alone; kubectl and Docker, which read 1e-5 as a number, would refuse the command."""
    words = ["1e-5", "1E5", "12e03", "-1e+3", ".5e1", "1.e5", "0o17", "y", "N", "1.5", "16", "on", "~"]
    others = ["1e", "e5", "1.2.3", "0o8", "yes!", "12ab", "--y", "."]
    lines = yaml_text([words + others]).splitlines()
    assert lines == [*(f"- '{word}'" for word in words), *(f"- {word}" for word in others)]
    assert yaml_text([{"a": 1, "b": 1e-5, "c": True, "d": None}]) == "a: 1\nb: 1.0e-05\nc: true\nd: null\n"


def test_compose_gives_every_worker_gpus_of_its_own() -> None:
    rendered = compose(
        SERVED, Options(prefill=1, decode=2, tp_prefill=3, tp_decode=2, bundle=BundleAt("host", "/srv/b"))
    )
    services = rendered["services"]
    assert list(services) == ["prefill-0", "decode-0", "decode-1", "router"]
    devices = [
        id_
        for name, service in services.items()
        if name != "router"
        for id_ in service["deploy"]["resources"]["reservations"]["devices"][0]["device_ids"]
    ]
    assert devices == ["0", "1", "2", "3", "4", "5", "6"]
    router = services["router"]["command"]
    at = router.index("--prefill")
    assert router[at : at + 3] == ["--prefill", "http://prefill-0:30000", "8998"]
    assert router.count("--decode") == 2
    assert services["router"]["ports"] == ["127.0.0.1:8000:8000"]
    assert all("ports" not in service for name, service in services.items() if name != "router")


def test_compose_leaves_requests_under_way_the_time_that_the_router_takes() -> None:
    """Compose kills after 10 s unless told otherwise."""
    rendered = compose(SERVED, Options(bundle=BundleAt("host", "/srv/b")))
    router = rendered["services"]["router"]["command"]
    least = int(router[router.index("--shutdown-grace-period-secs") + 1])
    assert all(int(service["stop_grace_period"].removesuffix("s")) > least for service in rendered["services"].values())


def test_compose_workers_may_load_the_code_they_compile() -> None:
    """Triton and FlashInfer build libraries under HOME; Docker mounts a tmpfs noexec unless told otherwise."""
    rendered = compose(SERVED, Options(bundle=BundleAt("host", "/srv/b")))
    for service in rendered["services"].values():
        assert (service["read_only"], service["environment"]["HOME"], service["tmpfs"]) == (True, "/tmp", ["/tmp:exec"])


def test_generated_tokens_are_counted_once() -> None:
    """A prefill worker counts the first token of each request as its own, and decode counts it again."""
    (panel,) = (candidate for candidate in PANELS if candidate.title == "Tokens generated")
    assert 'sglang:generation_tokens_total{engine_type="decode"}' in panel.queries["tokens/s"]


def test_deploy_holds_what_is_rendered() -> None:
    import runpy

    rendered = runpy.run_path(str(ROOT / "tools" / "deploy_base.py"))["files"]()
    stands = {str(f.relative_to(ROOT / "deploy")): f.read_text() for f in (ROOT / "deploy").rglob("*") if f.is_file()}
    assert {**rendered, "README.md": stands["README.md"]} == stands, "run: make deploy"


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from types import SimpleNamespace

    from pdtrim_deploy.bundle import Bundle
    from pdtrim_deploy.plan import KVSend, ModelShape, PDPlan

    shape = ModelShape(
        architecture="X", fingerprint="f", num_blocks=2, num_kv_heads=4, head_dim=8, kv_dtype="float16",
        pool_dtype="fp8_e4m3",
    )  # fmt: skip
    plan = PDPlan.dense(shape).with_kv((KVSend(mode="sparse", n_first=1), KVSend()))
    monkeypatch.setattr(Bundle, "open", lambda path: SimpleNamespace(path=path, prefill_dir=path, plan=plan))
    render = ("deploy", "render", "my-bundle")
    for name, value in (("--memory", "32Gi"), ("--monitoring", "other")):
        code, text, err = run(
            capsys, *render, "--to", "compose", "--bundle-from", "host:/srv/b", "--dry-run", name, value
        )
        assert (code, text) == (2, "")
        assert f"{name} is for Kubernetes; leave it out" in err
    out = tmp_path / "k"
    code, text, _ = run(capsys, *render, "--prefill", "2", "--decode", "6", "--out", out, "--json")
    assert code == 0
    assert json.loads(text)["plan"] == plan.digest
    decode = next(yaml.safe_load_all((out / "decode.yaml").read_text()))
    assert decode["spec"]["replicas"] == 6
    assert decode["spec"]["template"]["metadata"]["annotations"]["pdtrim/plan-digest"] == plan.digest
    command = container(decode)["command"]
    assert option(command, "--dtype") == "float16"
    assert option(command, "--kv-cache-dtype") == "fp8_e4m3"
    assert option(command, "--attention-backend") == "triton"
    assert option(command, "--served-model-name") == "my-bundle"
    named = yaml.safe_load((out / "kustomization.yaml").read_text())["resources"]
    assert {*named, "kustomization.yaml"} == {file.name for file in out.iterdir()}
    more = ("--prefill-args", "--log-level debug", "--decode-args", "--mem-fraction-static 0.8")
    code, text, _ = run(capsys, *render, *more, "--dry-run", "--json")
    assert code == 0
    workers = [json.loads(text)["files"][f"{stage}.yaml"][0] for stage in STAGES]
    assert [container(worker)["command"][-2:] for worker in workers] == [
        ["--log-level", "debug"],
        ["--mem-fraction-static", "0.8"],
    ]
    code, text, _ = run(capsys, *render, "--decode-args", "--mem-fraction-static 8e-1", "--dry-run")
    assert code == 0
    assert "- '8e-1'\n" in text
    code, _, err = run(capsys, *render, "--tp-decode", "3", "--out", tmp_path / "x")
    assert code == 2
    assert err.startswith("pdtrim-deploy: --tp-decode 3: 4 KV heads can neither be divided among 3 ranks")
    assert not (tmp_path / "x").exists()
    nixl = ("--transport", "pdtrim_nixl", "--transport-option", "accept_unauthenticated=true", "--rdma", "rdma/hca")
    code, text, _ = run(capsys, *render, *nixl, "--dry-run")
    assert code == 0
    assert text.count("- pdtrim_nixl") == 2
    code, text, _ = run(capsys, *render, "--to", "compose", "--bundle-from", "host:/b", "--out", tmp_path / "c")
    assert code == 0
    assert (tmp_path / "c" / "compose.yaml").exists()
