"""The manifests against the published schemas, and against each other and the server."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

from manyhats.api.auth import OPEN_ROUTES
from manyhats.config import Settings

VERSION = "1.33"
SERVER = {"app.kubernetes.io/name": "manyhats", "app.kubernetes.io/component": "server"}


@pytest.fixture(scope="module")
def folder(repository) -> Path:
    return repository / "deploy" / "kubernetes"


@pytest.fixture(scope="module")
def documents(folder):
    """(file, document) of every manifest that is no kustomization and no patch."""
    skipped = {"kustomization.yaml", "gpu.yaml", "without.yaml"}
    return [
        (path.relative_to(folder), document)
        for path in sorted(folder.rglob("*.yaml"))
        if path.name not in skipped
        for document in yaml.safe_load_all(path.read_text("utf-8"))
    ]


@pytest.fixture(scope="module")
def custom(repository):
    path = repository / "tests" / "deploy" / "schemas" / "custom.yaml"
    schemas = yaml.safe_load(path.read_text("utf-8"))
    return schemas.pop("definitions"), schemas


def one(documents, kind, name="manyhats"):
    (found,) = [d for _, d in documents if (d["kind"], d["metadata"]["name"]) == (kind, name)]
    return found


def problems(document, custom):
    definitions, schemas = custom
    key = f"{document['apiVersion']}/{document['kind']}"
    schema = {
        "definitions": definitions,
        "type": "object",
        "required": ["apiVersion", "kind", "metadata", "spec"],
        "additionalProperties": False,
        "properties": {
            "apiVersion": {},
            "kind": {},
            "metadata": {"$ref": "#/definitions/metadata"},
            "spec": schemas[key],
        },
    }
    return [
        error.message for error in jsonschema.Draft202012Validator(schema).iter_errors(document)
    ]


def test_every_manifest_fits_its_schema(documents, custom):
    kinds = set()
    for path, document in documents:
        kinds.add(document["kind"])
        if f"{document['apiVersion']}/{document['kind']}" in custom[1]:
            assert problems(document, custom) == [], path
        else:
            kubernetes_validate.validate(document, VERSION, strict=True)
    assert kinds >= {
        "Deployment", "Service", "PodDisruptionBudget", "ServiceMonitor", "InferencePool",
        "HorizontalPodAutoscaler", "NetworkPolicy", "InferenceModelRewrite", "HTTPRoute",
        "RayService",
    }  # fmt: skip


def test_the_schemas_can_refuse(documents, custom):
    pool = json.loads(json.dumps(one(documents, "InferencePool")))
    pool["spec"]["targetPortNumber"] = 8000
    assert problems(pool, custom)
    deployment = json.loads(json.dumps(one(documents, "Deployment")))
    deployment["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, VERSION, strict=True)


def test_every_file_is_reached_from_an_overlay(folder):
    reached, left = set(), [folder / "overlays" / name for name in ("cpu", "gpu", "ray")]
    while left:
        here = left.pop()
        listed = yaml.safe_load((here / "kustomization.yaml").read_text("utf-8"))
        reached.add(here / "kustomization.yaml")
        names = [*listed.get("resources", []), *listed.get("components", [])]
        names += [patch["path"] for patch in listed.get("patches", [])]
        for name in names:
            path = (here / name).resolve()
            assert path.exists(), path
            if path.is_dir():
                left.append(path)
            else:
                reached.add(path)
    assert reached == set(folder.rglob("*.yaml"))


def test_probes_are_three_open_routes_and_say_different_things(documents):
    (container,) = one(documents, "Deployment")["spec"]["template"]["spec"]["containers"]
    paths = [
        container[f"{p}Probe"]["httpGet"]["path"] for p in ("startup", "liveness", "readiness")
    ]
    assert paths == ["/startupz", "/healthz", "/readyz"]
    assert set(paths) <= OPEN_ROUTES


def test_the_drain_fits_the_grace_period(documents):
    settings = one(documents, "ConfigMap", "manyhats-settings")["data"]
    known = {f"MANYHATS_{name.upper()}" for name in Settings.model_fields}
    assert set(settings) <= known
    pod = one(documents, "Deployment")["spec"]["template"]["spec"]
    drain = float(settings["MANYHATS_DRAIN_GRACE_S"]) + float(settings["MANYHATS_DRAIN_S"])
    assert drain < pod["terminationGracePeriodSeconds"]
    # readiness is seen to be down well before the door closes
    probe = pod["containers"][0]["readinessProbe"]
    seen = probe["periodSeconds"] * probe["failureThreshold"]
    assert seen < float(settings["MANYHATS_DRAIN_GRACE_S"])


def test_kubernetes_own_variables_are_no_settings(documents):
    """A Service called `manyhats` would set MANYHATS_PORT=tcp://10.0.0.1:8000 and the like."""
    assert one(documents, "Service")["metadata"]["name"].upper() == "MANYHATS"
    pod = one(documents, "Deployment")["spec"]["template"]["spec"]
    assert pod["enableServiceLinks"] is False


def test_keys_are_files_of_a_secret(documents):
    settings = one(documents, "ConfigMap", "manyhats-settings")["data"]
    pod = one(documents, "Deployment")["spec"]["template"]["spec"]
    mounts = {m["name"]: m["mountPath"] for m in pod["containers"][0]["volumeMounts"]}
    for name in ("MANYHATS_ADMIN_API_KEYS_FILE", "MANYHATS_API_KEYS_FILE"):
        assert Path(settings[name]).parent == Path(mounts["keys"])


def test_replicas_that_share_the_registry_share_the_bytes(documents):
    """A version that one of them registered is routed to by all, and outlives its pod."""
    settings = one(documents, "ConfigMap", "manyhats-settings")["data"]
    assert "MANYHATS_REDIS_URL" in settings
    (workers,) = one(documents, "RayService")["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    for template in (one(documents, "Deployment")["spec"]["template"], workers["template"]):
        pod = template["spec"]
        mounts = {m["mountPath"]: m["name"] for m in pod["containers"][0]["volumeMounts"]}
        name = mounts[settings["MANYHATS_STORE"]]
        (volume,) = [v for v in pod["volumes"] if v["name"] == name]
        claim = volume["persistentVolumeClaim"]["claimName"]
        found = one(documents, "PersistentVolumeClaim", claim)
        assert found["spec"]["accessModes"] == ["ReadWriteMany"]


def test_selectors_meet_the_pods(documents):
    labels = one(documents, "Deployment")["spec"]["template"]["metadata"]["labels"]
    assert labels == SERVER
    for kind in (
        "Service",
        "PodDisruptionBudget",
        "NetworkPolicy",
        "ServiceMonitor",
        "InferencePool",
    ):
        spec = one(documents, kind)["spec"]
        selector = spec.get("podSelector") or spec["selector"]
        assert selector.get("matchLabels", selector) == SERVER, kind


def test_pods_run_without_root_on_a_read_only_file_system(documents):
    for _, document in documents:
        if document["kind"] not in ("Deployment", "StatefulSet"):
            continue
        pod = document["spec"]["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        for container in pod["containers"]:
            context = container["securityContext"]
            assert context["readOnlyRootFilesystem"] is True
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"] == {"drop": ["ALL"]}


def test_scaling_follows_the_queue(documents):
    (metric,) = one(documents, "HorizontalPodAutoscaler")["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] == "manyhats_waiting"


def test_the_operators_rules_are_the_files_rules(documents, repository):
    groups = [
        group
        for name in ("recording", "alerts")
        for group in yaml.safe_load(
            (repository / f"deploy/prometheus/rules/{name}.yml").read_text("utf-8")
        )["groups"]
    ]
    assert one(documents, "PrometheusRule")["spec"]["groups"] == groups


def test_the_gateway_leads_to_the_pool_and_the_pool_to_its_picker(documents):
    rule, models = one(documents, "HTTPRoute")["spec"]["rules"]
    assert rule["backendRefs"][0]["kind"] == "InferencePool"
    assert not any(
        match["path"]["value"].startswith("/admin")
        for r in (rule, models)
        for match in r["matches"]
    )
    reference = one(documents, "InferencePool")["spec"]["endpointPickerRef"]
    service = one(documents, "Service", reference["name"])
    assert reference["port"]["number"] in [p["port"] for p in service["spec"]["ports"]]
    config = yaml.safe_load(one(documents, "ConfigMap", "manyhats-picker")["data"]["plugins.yaml"])
    (profile,) = config["schedulingProfiles"]
    assert {p["pluginRef"] for p in profile["plugins"]} == {p["type"] for p in config["plugins"]}
    weights = {p["pluginRef"]: p.get("weight", 0) for p in profile["plugins"]}
    assert max(weights, key=weights.get) == "lora-affinity-scorer"


@pytest.fixture(scope="module")
def ray_cluster(documents):
    return one(documents, "RayService")["spec"]["rayClusterConfig"]


def ray_pods(cluster):
    """The pod templates that KubeRay makes pods of."""
    return [cluster["headGroupSpec"]["template"]] + [
        group["template"] for group in cluster["workerGroupSpecs"]
    ]


def test_rays_pods_fit_kubernetes_schema_and_our_rules(ray_cluster):
    for pod in ray_pods(ray_cluster):
        kubernetes_validate.validate(
            {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": pod["spec"]},
            VERSION,
            strict=True,
        )
        assert pod["metadata"]["labels"] == SERVER, "the network policies and the budget meet it"
        assert pod["spec"]["enableServiceLinks"] is False
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
        (container,) = pod["spec"]["containers"]
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        assert {m["mountPath"] for m in container["volumeMounts"]} >= {"/tmp", "/var/lib/manyhats"}
        assert {"name": "serve", "containerPort": 8000} in container["ports"]


def test_ray_serves_the_same_application_there_and_has_room_for_its_replicas(
    documents, ray_cluster, repository
):
    spec = one(documents, "RayService")["spec"]
    text = (repository / "deploy" / "ray" / "serve.yaml").read_text("utf-8")
    config = yaml.safe_load(spec["serveConfigV2"])
    assert config == yaml.safe_load(text)
    args = config["applications"][0]["args"]
    (workers,) = ray_cluster["workerGroupSpecs"]
    assert (workers["minReplicas"], workers["maxReplicas"]) == (
        args["min_replicas"],
        args["max_replicas"],
    )
    (container,) = workers["template"]["spec"]["containers"]
    limits = container["resources"]["limits"]
    assert int(limits["cpu"]) >= args["num_cpus"], "Ray counts the limit as what a node has"
    assert int(limits["nvidia.com/gpu"]) == args["num_gpus"]
    mounts = {m["mountPath"] for m in container["volumeMounts"]}
    assert args["home"] in mounts
    assert args["flags"].split("--store ")[1] in mounts
    assert container["envFrom"] == [{"configMapRef": {"name": "manyhats-settings"}}]


def test_rays_readiness_asks_without_wget(ray_cluster):
    """KubeRay's own probe of a worker of a RayService would, and the image has none."""
    (workers,) = ray_cluster["workerGroupSpecs"]
    (container,) = workers["template"]["spec"]["containers"]
    python, _, source = container["readinessProbe"]["exec"]["command"]
    assert python == "python"
    compile(source, "readinessProbe", "exec")
    assert ray_cluster["rayVersion"] >= "2.53", "the head's probes are HTTP from there on"
