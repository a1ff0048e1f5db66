"""The deployment files: what Kubernetes, KubeRay, Serve and our config would say to them, and whether they agree."""

import gzip
import importlib
import inspect
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import click
import jsonschema
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from cluster.config import ClusterConfig
from protos.services import ROUTER_SERVICE

ROOT = Path(__file__).parent.parent
CRDS = ROOT.parent / "shared" / "crds"  # given where this project is developed, not part of it
DNS_1123 = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
PACKAGES = {"cluster", "experts", "protos", "router"}

DOCUMENTS: list[dict[str, Any]] = [
    document for path in sorted((ROOT / "k8s").glob("*.yaml")) for document in yaml.safe_load_all(path.read_text())
]


def of_kind(kind: str) -> list[dict[str, Any]]:
    return [document for document in DOCUMENTS if document["kind"] == kind]


SERVICE = of_kind("RayService")[0]
RAY_CLUSTER = SERVICE["spec"]["rayClusterConfig"]
SERVE = yaml.safe_load(SERVICE["spec"]["serveConfigV2"])
APPLICATION = SERVE["applications"][0]
CONFIG = ClusterConfig.model_validate(APPLICATION["args"])
HEAD = RAY_CLUSTER["headGroupSpec"]
WORKERS: dict[str, dict[str, Any]] = {group["groupName"]: group for group in RAY_CLUSTER["workerGroupSpecs"]}
GPU_GROUPS = {name: group for name, group in WORKERS.items() if "num-gpus" in group["rayStartParams"]}
CPU_GROUPS = {name: group for name, group in WORKERS.items() if name not in GPU_GROUPS}


def pods() -> Iterator[tuple[str, dict[str, Any]]]:
    """(group name, pod template)."""
    yield "head", HEAD["template"]
    for name, group in WORKERS.items():
        yield name, group["template"]


def container(template: dict[str, Any]) -> dict[str, Any]:
    """The Ray container: KubeRay takes the first."""
    first: dict[str, Any] = template["spec"]["containers"][0]
    return first


def container_ports(template: dict[str, Any]) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for port in container(template)["ports"]}


def pinned(package: str) -> str:
    found = re.search(rf"^{package}==(.+)$", (ROOT / "constraints.txt").read_text(), re.M)
    assert found is not None
    return found[1]


def version() -> str:
    return str(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"])


def strict(schema: Any) -> Any:
    """The schema with unknown fields refused, as `kubectl apply` does, unless it says that they are kept."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    copy = {key: strict(value) for key, value in schema.items()}
    keeps = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object" and not keeps:
        copy["additionalProperties"] = False
    return copy


@cache
def ray_service_schema() -> dict[str, Any]:
    """The CRD's schema where the CRDs are there, else what every RayService must have."""
    for path in sorted(CRDS.glob("ray.io_rayservices.*.yaml.gz")):
        crd = yaml.load(gzip.decompress(path.read_bytes()), Loader=yaml.CSafeLoader)  # megabytes: the C parser
        served = {entry["name"]: entry["schema"]["openAPIV3Schema"] for entry in crd["spec"]["versions"]}
        schema: dict[str, Any] = served["v1"]
        schema["properties"]["metadata"] = {"type": "object"}
        return dict(strict(schema))
    groups = {"type": "array", "items": {"required": ["groupName", "maxReplicas", "minReplicas", "template"]}}
    return {
        "required": ["apiVersion", "kind", "metadata", "spec"],
        "properties": {
            "apiVersion": {"const": "ray.io/v1"},
            "kind": {"const": "RayService"},
            "spec": {
                "required": ["serveConfigV2", "rayClusterConfig"],
                "properties": {
                    "serveConfigV2": {"type": "string"},
                    "rayClusterConfig": {
                        "required": ["headGroupSpec", "rayVersion"],
                        "properties": {"workerGroupSpecs": groups},
                    },
                },
            },
        },
    }


# ------------------------------------------------------------------ Kubernetes and KubeRay


def test_the_ray_service_validates_against_kuberays_schema() -> None:
    jsonschema.Draft4Validator(ray_service_schema()).validate(SERVICE)


def test_the_schema_check_refuses_a_manifest_without_a_head_group() -> None:
    broken = {**SERVICE, "spec": {**SERVICE["spec"], "rayClusterConfig": {"rayVersion": "2"}}}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft4Validator(ray_service_schema()).validate(broken)


def test_there_is_one_ray_service_and_no_file_is_empty() -> None:
    assert len(of_kind("RayService")) == 1
    assert SERVICE["apiVersion"] == "ray.io/v1"
    assert all(document and document["apiVersion"] and document["kind"] for document in DOCUMENTS)


def test_names_are_valid_dns_labels() -> None:
    names = [document["metadata"]["name"] for document in DOCUMENTS]
    for _, template in pods():
        names += [entry["name"] for entry in template["spec"]["containers"]]
        names += [volume["name"] for volume in template["spec"]["volumes"]]
        names += [port["name"] for entry in template["spec"]["containers"] for port in entry["ports"]]
    for name in [*names, *WORKERS]:
        assert DNS_1123.fullmatch(name), f"{name!r} is not a DNS-1123 label"
    assert len(SERVICE["metadata"]["name"]) <= 41, "KubeRay appends to it"
    for _, template in pods():
        assert all(len(port) <= 15 for port in container_ports(template)), "port names have 15 characters at most"


def test_every_pod_states_its_resources_and_may_not_exceed_them() -> None:
    for name, template in pods():
        resources = container(template)["resources"]
        assert {"cpu", "memory"} <= resources["requests"].keys(), name
        assert resources["requests"] == resources["limits"], f"{name}: Ray takes its capacity from the limits"


def test_pods_run_without_privileges() -> None:
    for name, template in pods():
        security = template["spec"]["securityContext"]
        assert security["runAsNonRoot"] is True, name
        assert security["runAsUser"] != 0, name
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}, name
        for entry in template["spec"]["containers"]:
            assert entry["securityContext"]["allowPrivilegeEscalation"] is False, name
            assert entry["securityContext"]["capabilities"] == {"drop": ["ALL"]}, name


# ------------------------------------------------------------------ Ray


def test_versions_are_the_tested_ones() -> None:
    assert RAY_CLUSTER["rayVersion"] == pinned("ray")
    for name, template in pods():
        image, _, tag = container(template)["image"].rpartition(":")
        assert image.endswith("expertmesh"), name
        assert tag == version() + ("-gpu" if name in GPU_GROUPS else ""), f"{name}: image tag {tag}"


def test_ray_scales_the_pods() -> None:
    assert RAY_CLUSTER["enableInTreeAutoscaling"] is True
    assert RAY_CLUSTER["autoscalerOptions"]["version"] == "v2"
    for name, group in WORKERS.items():
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"], name


def test_the_head_takes_no_work() -> None:
    assert HEAD["rayStartParams"]["num-cpus"] == "0"
    assert "num-gpus" not in HEAD["rayStartParams"]


def test_there_is_an_expert_group_for_each_gpu_type() -> None:
    assert len(GPU_GROUPS) >= 2
    selectors = [group["template"]["spec"]["nodeSelector"] for group in GPU_GROUPS.values()]
    products = [selector["nvidia.com/gpu.product"] for selector in selectors]
    assert len(set(products)) == len(GPU_GROUPS), "each group has nodes of its own"
    for name, group in GPU_GROUPS.items():
        template = group["template"]
        limits = container(template)["resources"]["limits"]
        assert limits["nvidia.com/gpu"] == group["rayStartParams"]["num-gpus"] == str(int(CONFIG.experts.num_gpus)), (
            name
        )
        assert any(entry["key"] == "nvidia.com/gpu" for entry in template["spec"]["tolerations"]), name


def test_only_gpu_pods_hold_gpus() -> None:
    for name, group in CPU_GROUPS.items():
        assert "nvidia.com/gpu" not in container(group["template"])["resources"]["limits"], name


# ------------------------------------------------------------------ Serve and our config


def test_the_serve_config_is_one_serve_accepts() -> None:
    assert len(ServeDeploySchema.model_validate(SERVE).applications) == 1


def test_the_import_path_is_a_builder_that_takes_a_cluster_config() -> None:
    module, _, name = APPLICATION["import_path"].partition(":")
    assert (module, name) == ("cluster.app", "build")
    build = getattr(importlib.import_module(module), name)
    assert next(iter(inspect.get_annotations(build, eval_str=True).values())) is ClusterConfig


def test_the_application_and_the_config_agree_on_name_and_path() -> None:
    assert APPLICATION["name"] == CONFIG.name
    assert APPLICATION["route_prefix"] == CONFIG.router.route_prefix


def test_ports_agree_between_config_pods_and_services() -> None:
    assert SERVE["http_options"]["port"] == CONFIG.router.http_port
    assert SERVE["http_options"]["host"] == CONFIG.router.host == "0.0.0.0", "pods are reached from outside themselves"
    assert CONFIG.router.port != 0, "a Service needs a fixed port"
    for name, template in pods():
        assert container_ports(template)["serve"] == CONFIG.router.http_port, name
    router = WORKERS["router"]["template"]
    assert container_ports(router)["grpc"] == CONFIG.router.port
    (service,) = of_kind("Service")
    (port,) = service["spec"]["ports"]
    assert port["targetPort"] in container_ports(router)
    assert port["port"] == container_ports(router)[port["targetPort"]] == CONFIG.router.port


def test_the_router_service_selects_router_pods_that_serve() -> None:
    (service,) = of_kind("Service")
    selector = service["spec"]["selector"]
    assert selector["ray.io/group"] == "router"  # KubeRay's label for the group
    labels = WORKERS["router"]["template"]["metadata"]["labels"]
    assert labels["app.kubernetes.io/part-of"] == selector["app.kubernetes.io/part-of"]
    probe = container(WORKERS["router"]["template"])["readinessProbe"]["grpc"]
    assert probe == {"port": CONFIG.router.port, "service": ROUTER_SERVICE}


def test_routers_fit_into_router_pods_only_and_expert_servers_onto_gpu_pods_only() -> None:
    routers = sum(group["minReplicas"] for group in CPU_GROUPS.values())
    cpus = float(container(WORKERS["router"]["template"])["resources"]["limits"]["cpu"])
    assert CONFIG.router.num_cpus <= cpus < 2 * CONFIG.router.num_cpus, "one router for each pod"
    assert CONFIG.router.num_replicas <= routers
    assert CONFIG.router.num_cpus > 0
    for name, group in GPU_GROUPS.items():
        assert group["rayStartParams"]["num-cpus"] == "0", f"{name} must not attract routers"
    assert CONFIG.experts.num_cpus == 0
    assert CONFIG.experts.num_gpus > 0


def test_the_pool_fits_the_groups() -> None:
    lowest = sum(group["minReplicas"] for group in GPU_GROUPS.values())
    highest = sum(group["maxReplicas"] for group in GPU_GROUPS.values())
    assert CONFIG.experts.max_servers_per_node == 1, "the loss of a pod costs one server"
    assert lowest <= CONFIG.experts.min_servers, "pods without a server cost money"
    assert CONFIG.experts.max_servers <= highest, "Serve must not wait for pods that cannot come"


def test_nothing_is_emulated_in_production() -> None:
    assert CONFIG.experts.settings.emulated_tokens_per_s is None


def test_every_pod_sees_the_model_read_only() -> None:
    (claim,) = of_kind("PersistentVolumeClaim")
    for name, template in pods():
        volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
        (mount,) = container(template)["volumeMounts"]
        assert mount["readOnly"] is True, name
        assert Path(CONFIG.model).is_relative_to(mount["mountPath"]), name
        assert volumes[mount["name"]]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"], name


def test_pods_live_long_enough_to_drain() -> None:
    for name, group in WORKERS.items():
        spec = group["template"]["spec"]
        command = container(group["template"])["lifecycle"]["preStop"]["exec"]["command"][-1]
        deadline = re.search(r"--deadline-remaining-seconds (\d+)", command)
        assert deadline is not None, name
        assert CONFIG.experts.drain_timeout_s < int(deadline[1]) < spec["terminationGracePeriodSeconds"], name
        assert f"{{1..{deadline[1]}}}" in command, f"{name}: waits as long as it announced"


def test_the_drain_command_is_one_that_this_ray_has() -> None:
    from ray.scripts.scripts import drain_node

    command = container(WORKERS["router"]["template"])["lifecycle"]["preStop"]["exec"]["command"][-1]
    options = {option for parameter in drain_node.params for option in parameter.opts}
    used = re.findall(r"(--[a-z-]+)", command.partition(";")[0])
    assert used
    assert set(used) <= options
    (reasons,) = [kind.choices for entry in drain_node.params if isinstance(kind := entry.type, click.Choice)]
    assert "DRAIN_NODE_REASON_PREEMPTION" in [getattr(reason, "name", reason) for reason in reasons]


# ------------------------------------------------------------------ the image


DOCKERFILE = (ROOT / "Dockerfile").read_text()
# One instruction per entry, continuation lines joined, comments gone.
INSTRUCTIONS = [
    (line.split(maxsplit=1)[0], line.split(maxsplit=1)[1])
    for line in re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.M)).splitlines()
    if line.strip()
]


def arguments(instruction: str) -> list[str]:
    return [rest for name, rest in INSTRUCTIONS if name == instruction]


def defaults() -> dict[str, str]:
    return {name: value.strip('"') for name, _, value in (entry.partition("=") for entry in arguments("ARG"))}


def test_the_image_starts_from_the_official_one_of_the_tested_ray() -> None:
    (base,) = arguments("FROM")
    for name, value in defaults().items():
        base = base.replace(f"${{{name}}}", value)
    assert base == f"rayproject/ray:{pinned('ray')}-py311"
    assert defaults()["VARIANT"] == "", "-gpu is a build argument"


def test_the_image_holds_the_four_packages_and_installs_with_the_constraints() -> None:
    copied = {word.rstrip("/") for entry in arguments("COPY") for word in entry.split()[:-1]}
    assert PACKAGES | {"constraints.txt", "pyproject.toml"} <= copied
    assert any("-c constraints.txt" in entry for entry in arguments("RUN"))


def test_the_image_build_proves_that_the_entry_point_is_there() -> None:
    module, _, name = APPLICATION["import_path"].partition(":")
    assert any(f"import {module}" in entry and f"{module}.{name}" in entry for entry in arguments("RUN"))


def test_the_image_preloads_what_replicas_import() -> None:
    environment = dict(pair.split("=", 1) for entry in arguments("ENV") for pair in entry.split())
    modules = environment["RAY_preload_python_modules"].split(",")
    assert "torch" in modules
    for module in modules:
        importlib.import_module(module)


def test_the_image_does_not_run_as_root() -> None:
    assert INSTRUCTIONS[-1] == ("USER", "ray")
    assert arguments("USER") == ["ray"]
    assert all("--chown=ray:users" in entry for entry in arguments("COPY"))


def test_the_build_context_holds_what_the_image_copies_and_no_more() -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {word.rstrip("/") for entry in arguments("COPY") for word in entry.split() if not word.startswith("--")}
    sources = {word for word in copied if (ROOT / word).exists() and not word.startswith((".", "/"))}
    assert sources <= kept
    assert "*" in (ROOT / ".dockerignore").read_text().splitlines()
    assert kept - sources <= {"examples/demo_model", "README.md", "LICENSE"}
