"""infra/, as far as it can be checked without a cloud, a cluster or Docker."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import typer.main
import yaml

from pipeline.cli import app
from tests.checkout import ROOT

INFRA = ROOT / "infra"
FILES = sorted(path for path in INFRA.rglob("*") if path.is_file())
SCRIPTS = sorted(INFRA.glob("*.sh"))
CLUSTER = INFRA / "kuberay/raycluster.yaml"
JOB = INFRA / "kuberay/rayjob.yaml"
RAY_UP = INFRA / "ray-up.yaml"

# The fields of ray.io/v1 that may be used here, from KubeRay's API reference (v1.7); what is not in
# the table is a misspelling until the reference says otherwise. Pods have a schema, see below.
FIELDS = {
    "RayJob": {
        "submissionMode", "entrypoint", "backoffLimit", "submitterConfig", "submitterPodTemplate",
        "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "activeDeadlineSeconds",
        "rayClusterSpec", "runtimeEnvYAML", "suspend",
    },
    "RayCluster": {
        "rayVersion", "authOptions", "enableInTreeAutoscaling", "autoscalerOptions",
        "headGroupSpec", "workerGroupSpecs", "suspend",
    },
    "head": {"rayStartParams", "template", "serviceType"},
    "worker": {
        "groupName", "replicas", "minReplicas", "maxReplicas", "numOfHosts", "rayStartParams",
        "template",
    },
    "autoscalerOptions": {"upscalingMode", "idleTimeoutSeconds", "version", "resources"},
    "authOptions": {"mode", "secretName"},
}  # fmt: skip


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def cluster() -> dict[str, Any]:
    return load(CLUSTER)["spec"]


def groups() -> dict[str, dict[str, Any]]:
    """The head and the worker groups, by name."""
    spec = cluster()
    return {"head": spec["headGroupSpec"], **{g["groupName"]: g for g in spec["workerGroupSpecs"]}}


def container(group: dict[str, Any]) -> dict[str, Any]:
    (only,) = group["template"]["spec"]["containers"]
    return only


def commands() -> list[str]:
    """Every pipeline and composer command that a file of infra shows or runs."""
    found = []
    for path in FILES:
        text = path.read_text()
        if path == JOB:
            text = load(path)["spec"]["entrypoint"]
        text = re.sub(r"\\\n[# ]*", " ", text)
        found += re.findall(r"\bpipeline (?:run|status|fetch) [^\n`'\"…&|]+", text)
        found += re.findall(r"\bcomposer training/[^\n`'\"…&|]+yaml[^\n`'\"…&|]*", text)
    return sorted({command.strip() for command in found})


# -- commands ------------------------------------------------------------------------------------


def test_the_commands_are_found():
    assert any(
        c.startswith("pipeline run all --config") and "--address auto" in c for c in commands()
    )
    assert "composer training/train.py yamls/1b.yaml" in commands()


@pytest.mark.parametrize("line", [c for c in commands() if c.startswith("pipeline ")])
def test_every_pipeline_command_parses(line):
    """By the real parser: a flag that does not exist, or a value of the wrong kind, raises."""
    words = shlex.split(line.split("  #")[0])[1:]
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    command.make_context(command.name, words)
    for word in words:
        if word.endswith(".yaml"):
            assert (ROOT / word).is_file(), word


@pytest.mark.parametrize("line", [c for c in commands() if c.startswith("composer ")])
def test_every_composer_command_names_files_that_exist(line):
    script, run = shlex.split(line)[1:3]
    assert (ROOT / script).is_file()
    assert (ROOT / run).is_file()


# -- secrets and addresses ------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(INFRA)))
def test_no_secret_and_no_package_index_is_written_down(path):
    text = path.read_text()
    secrets = r"AKIA[0-9A-Z]{16}|hf_[A-Za-z0-9]{20,}|-----BEGIN|(?<![0-9a-f])[0-9a-f]{40,}"
    assert not re.search(secrets, text)
    # A value that is written out, not referred to.
    assert not re.search(r"(SECRET\w*|_TOKEN|PASSWORD)\s*[=:]\s*['\"]?[A-Za-z0-9+/]{8,}", text)
    assert not re.search(r"--(extra-)?index(-url)?\b|--find-links|PIP_INDEX|UV_INDEX", text)
    if path.suffix != ".md":
        assert "http://" not in text
        assert "https://" not in text


# -- Dockerfile -----------------------------------------------------------------------------------


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"^#.*\n", "", (INFRA / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    pairs = (line.split(None, 1) for line in lines if line.strip())
    return [(name, rest) for name, rest in pairs]


def test_what_the_image_copies_exists_and_is_not_ignored():
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignore
    for name, rest in instructions():
        if name == "COPY":
            for source in rest.split()[:-1]:
                assert (ROOT / source).exists(), source
                assert f"!{source}" in ignore, source


def test_the_image_installs_the_hashed_lock_before_the_source():
    order = [(name, rest) for name, rest in instructions() if name in ("COPY", "RUN")]
    texts = [f"{name} {rest}" for name, rest in order]
    sync = next(i for i, text in enumerate(texts) if "pip sync" in text)
    assert "--require-hashes" in texts[sync]
    assert "--compile-bytecode" in texts[sync]
    assert texts[sync - 1].startswith("COPY requirements.lock")
    assert all("requirements.lock" in t for t in texts[:sync] if t.startswith("COPY"))
    assert any("wget" in text for text in texts[:sync])  # KubeRay's health probes
    (project,) = [text for text in texts if "--editable" in text]
    assert "--offline" in project  # nothing unpinned comes in with it
    assert "--no-deps" in project


def test_the_images_user_is_not_root_and_its_command_can_be_replaced():
    names = [name for name, _ in instructions()]
    (user,) = [rest for name, rest in instructions() if name == "USER"]
    assert user.isdigit()  # Kubernetes' runAsNonRoot needs a number
    assert int(user) > 0
    assert names.index("USER") > max(i for i, name in enumerate(names) if name == "RUN")
    assert "ENTRYPOINT" not in names
    assert names[-1] == "CMD"
    (image,) = [rest for name, rest in instructions() if name == "FROM"]
    assert re.fullmatch(r"python:3\.11-slim", image)


def test_every_file_uses_the_same_image_and_the_locked_ray():
    images = {container(group)["image"] for group in groups().values()}
    assert images == {load(RAY_UP)["docker"]["image"]}
    locked = re.search(r"^ray==(\S+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert locked
    assert cluster()["rayVersion"] == locked[1]


# -- Kubernetes -----------------------------------------------------------------------------------


def test_kuberay_objects_use_known_fields():
    job = load(JOB)
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert set(job) == {"apiVersion", "kind", "metadata", "spec"}
    assert set(job["spec"]) <= FIELDS["RayJob"]
    assert job["spec"]["submissionMode"] in {"K8sJobMode", "HTTPMode", "SidecarMode"}
    assert set(job["spec"]["submitterConfig"]) == {"backoffLimit"}
    whole = load(CLUSTER)
    assert (whole["apiVersion"], whole["kind"]) == ("ray.io/v1", "RayCluster")
    spec = whole["spec"]
    assert set(spec) <= FIELDS["RayCluster"]
    assert set(spec["autoscalerOptions"]) <= FIELDS["autoscalerOptions"]
    assert set(spec["authOptions"]) <= FIELDS["authOptions"]
    assert set(spec["headGroupSpec"]) <= FIELDS["head"]
    for group in spec["workerGroupSpecs"]:
        assert set(group) <= FIELDS["worker"]
    for group in groups().values():
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())


def test_the_job_brings_the_same_cluster():
    assert load(JOB)["spec"]["rayClusterSpec"] == cluster()


@pytest.mark.parametrize("name", groups())
@pytest.mark.parametrize("version", ["1.30", kubernetes_validate.latest_version()])
def test_pod_templates_meet_kubernetes_own_schema(name, version):
    template = groups()[name]["template"]
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, **template}
    kubernetes_validate.validate(pod, version, strict=True)
    pod["spec"] = {**pod["spec"], "toleration": []}
    with pytest.raises(kubernetes_validate.ValidationError):  # the check does look
        kubernetes_validate.validate(pod, version, strict=True)


@pytest.mark.parametrize("name", groups())
def test_pods_get_keys_by_reference_and_time_to_end(name):
    group = groups()[name]
    pod = group["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] == 30
    assert pod["securityContext"]["runAsNonRoot"] is True
    keys = {item["name"]: item for item in container(group)["env"]}
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN"):
        assert set(keys[key]) == {"name", "valueFrom"}
        assert keys[key]["valueFrom"]["secretKeyRef"]["name"] == "microdit"


def test_the_head_makes_no_shards_and_only_encode_nodes_have_gpus():
    spec = cluster()
    assert spec["authOptions"]["mode"] == "token"
    assert spec["enableInTreeAutoscaling"] is True
    assert groups()["head"]["rayStartParams"]["num-cpus"] == "0"
    with_gpu = [
        n for n, g in groups().items() if "nvidia.com/gpu" in str(container(g)["resources"])
    ]
    assert with_gpu == ["gpu-spot"]
    for name in ("cpu", "gpu-spot"):
        assert groups()[name]["minReplicas"] == 0
    keys = {item["key"] for item in groups()["gpu-spot"]["template"]["spec"]["tolerations"]}
    assert "nvidia.com/gpu" in keys


def test_the_job_asks_for_the_workers_that_the_cpu_group_can_grow_to():
    """Fewer would leave nodes out; more would start GPU nodes for stages that need none."""
    words = load(JOB)["spec"]["entrypoint"].split()
    cpu = groups()["cpu"]
    cores = cpu["maxReplicas"] * int(container(cpu)["resources"]["limits"]["cpu"])
    assert int(words[words.index("--workers") + 1]) == cores


# -- ray up ---------------------------------------------------------------------------------------


def test_rays_own_validator_takes_the_cluster_file():
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(load(RAY_UP))
    validate_config(config)
    types = config["available_node_types"]
    assert types[config["head_node_type"]]["resources"]["CPU"] == 0
    assert types["gpu-spot"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert "InstanceMarketOptions" not in types["head"]["node_config"]
    # The image has everything: none of Ray's default installations is left.
    assert config["head_setup_commands"] == config["worker_setup_commands"] == []
    with pytest.raises(Exception, match="max_worker"):  # the check does look
        validate_config({**config, "max_worker": 3})


def test_the_nodes_are_what_ec2_takes():
    """Against the EC2 client's own description of RunInstances: names and kinds of every field."""
    import botocore.session
    from botocore.validate import ParamValidator

    model = botocore.session.get_session().get_service_model("ec2")
    shape: Any = model.operation_model("RunInstances").input_shape
    for kind in load(RAY_UP)["available_node_types"].values():
        request = {**kind["node_config"], "MinCount": 1, "MaxCount": 1}
        report = ParamValidator().validate(request, shape)
        assert not report.has_errors(), report.generate_report()


def test_every_ray_start_has_flags_that_ray_has():
    from ray.scripts.scripts import start

    known = {flag for option in start.params for flag in option.opts}
    texts = [*load(RAY_UP)["head_start_ray_commands"], *load(RAY_UP)["worker_start_ray_commands"]]
    texts.append(re.sub(r"\\\n", " ", (INFRA / "slurm.sh").read_text()))
    lines = [line for line in "\n".join(texts).splitlines() if "ray start" in line]
    assert len(lines) >= 4
    for line in lines:
        for flag in re.findall(r"(--[a-z-]+)", line.split("ray start", 1)[1]):
            assert flag in known, flag


# -- scripts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse_and_pass_shellcheck(path):
    subprocess.run(["bash", "-n", path], check=True)
    shellcheck = Path(sys.executable).parent / "shellcheck"
    result = subprocess.run(
        [shellcheck, "--severity=warning", path], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_neither_sleep_nor_kill_by_name(path):
    code = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    assert not re.search(r"\b(sleep|pkill|killall)\b", "\n".join(code))
