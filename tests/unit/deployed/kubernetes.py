"""Checks of a Kubernetes manifest with a RayCluster: against schemas, against our configurations, against itself.

Each yields its problems in words. The field names of KubeRay are those of its API, version 1.7.
"""

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import kubernetes_validate
import yaml
from deployed.configured import below, configurations
from documents.commands import same_path
from generate.http_api import document
from pydantic import BaseModel, ConfigDict, ValidationError
from tls_files import self_signed

from rl_loop.config import TrainConfig
from rollout_service.config import ServiceConfig
from rollout_service.fleet.resources import demands_of, shortfall
from rollout_service.http.tokens import OPEN_PATHS

KUBERNETES = "1.37"
Resource = dict[str, Any]


class _OfKubeRay(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class AuthOptions(_OfKubeRay):
    mode: Literal["disabled", "token"]


class HeadGroup(_OfKubeRay):
    rayStartParams: dict[str, str]
    template: Resource


class WorkerGroup(HeadGroup):
    groupName: str
    replicas: int
    minReplicas: int
    maxReplicas: int


class Spec(_OfKubeRay):
    rayVersion: str
    authOptions: AuthOptions
    headGroupSpec: HeadGroup
    workerGroupSpecs: list[WorkerGroup]


class RayCluster(_OfKubeRay):
    """The fields of KubeRay's that the manifest uses. `make test-crd` asks KubeRay's own schema."""

    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayCluster"]
    metadata: Resource
    spec: Spec


class Manifest:
    def __init__(self, text: str):
        self.resources: list[Resource] = [one for one in yaml.safe_load_all(text) if one]

    def of(self, kind: str) -> list[Resource]:
        return [one for one in self.resources if one["kind"] == kind]

    def names(self, kind: str) -> set[str]:
        return {one["metadata"]["name"] for one in self.of(kind)}

    @property
    def cluster(self) -> Resource:
        return self.of("RayCluster")[0]["spec"]

    @property
    def head(self) -> Resource:
        return self.cluster["headGroupSpec"]["template"]

    @property
    def learner(self) -> Resource:
        return self.of("Job")[0]["spec"]["template"]

    @property
    def templates(self) -> list[Resource]:
        return [self.head, *(group["template"] for group in self.cluster["workerGroupSpecs"]), self.learner]


def schemas(manifest: Manifest) -> Iterator[str]:
    for one in manifest.resources:
        known = [one]
        if one["kind"] == "RayCluster":
            try:
                RayCluster.model_validate(one)
            except ValidationError as error:
                yield from (".".join(map(str, p["loc"])) + f": {p['msg']}" for p in error.errors())
                continue
            groups = [one["spec"]["headGroupSpec"], *one["spec"]["workerGroupSpecs"]]
            known = [{"apiVersion": "v1", "kind": "PodTemplate", "template": group["template"]} for group in groups]
        for resource in known:
            try:
                kubernetes_validate.validate(resource, KUBERNETES, strict=True)
            except kubernetes_validate.ValidationError as error:
                yield f"{one['kind']}.{'.'.join(map(str, error.path))}: {error.message}"


def references(manifest: Manifest, secrets: dict[str, set[str]]) -> Iterator[str]:
    """Volumes lead to what is there, and mounts to volumes. `secrets`: the keys of each secret that a user makes."""
    keys = {("secret", name): found for name, found in secrets.items()}
    keys |= {("configMap", one["metadata"]["name"]): set(one["data"]) for one in manifest.of("ConfigMap")}
    for template in manifest.templates:
        container, volumes = template["spec"]["containers"][0], template["spec"].get("volumes", [])
        for volume in volumes:
            for kind, named in (("secret", "secretName"), ("configMap", "name")):
                source = volume.get(kind)
                if source is not None and (kind, source[named]) not in keys:
                    yield f"{container['name']}: there is no {kind} {source[named]}"
                elif source is not None:
                    wanted = {item["key"] for item in source.get("items", [])}
                    yield from (
                        f"{container['name']}: {source[named]} has no {key}"
                        for key in wanted - keys[kind, source[named]]
                    )
            claim = volume.get("persistentVolumeClaim", {}).get("claimName")
            if claim is not None and claim not in manifest.names("PersistentVolumeClaim"):
                yield f"{container['name']}: there is no claim {claim}"
        mounted, there = {m["name"] for m in container["volumeMounts"]}, {volume["name"] for volume in volumes}
        yield from (f"{container['name']}: volume {name} is mounted or there, not both" for name in mounted ^ there)


def _mounted(manifest: Manifest, template: Resource, secrets: dict[str, set[str]], root: Path) -> dict[str, Resource]:
    """Write what the pod's container finds below `root`. Returns the claims by the path that they are mounted at."""
    data = {one["metadata"]["name"]: one["data"] for one in manifest.of("ConfigMap")}
    claims = {one["metadata"]["name"]: one for one in manifest.of("PersistentVolumeClaim")}
    volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
    pair, on_claims = self_signed(root / "made"), {}
    for mount in template["spec"]["containers"][0]["volumeMounts"]:
        folder, volume = root / mount["mountPath"].strip("/"), volumes[mount["name"]]
        folder.mkdir(parents=True)
        if "persistentVolumeClaim" in volume:
            on_claims[mount["mountPath"]] = claims[volume["persistentVolumeClaim"]["claimName"]]
        elif "configMap" in volume:
            for key, text in data[volume["configMap"]["name"]].items():
                (folder / key).write_text(below(root, text), encoding="utf-8")
        else:
            source = volume["secret"]
            for key in [item["key"] for item in source.get("items", [])] or secrets[source["secretName"]]:
                made = pair.key.read_bytes() if key.endswith(".key") else pair.certificate.read_bytes()
                (folder / key).write_bytes(b"secret" if key == "token" else made)
    return on_claims


def configured(manifest: Manifest, secrets: dict[str, set[str]], models: str, root: Path) -> Iterator[str]:
    """Both commands take their files, and what they write is on volumes. `models`: the image's HF_HOME."""
    found: dict[str, Any] = {}
    for name, template in (("head", manifest.head), ("learner", manifest.learner)):
        container, here = template["spec"]["containers"][0], root / name
        claims = _mounted(manifest, template, secrets, here)
        command, arguments = container["command"], container.get("args", [])
        try:
            (found[name],) = configurations(arguments[0] if arguments else " ".join(command), here)
        except ValueError as error:
            yield f"{name}: {str(error).replace(str(here), '')}"
            continue
        written = found[name].state if name == "head" else found[name].output
        claim = claims.get("/" + written.relative_to(here).parts[0])
        if claim is None:
            yield f"{name}: /{written.relative_to(here)} is on no volume"
        elif claim["spec"]["accessModes"] != ["ReadWriteOnce"]:
            yield f"{name}: /{written.relative_to(here)} is not on a disk of its own"
        for one in manifest.templates:
            if models not in {mount["mountPath"] for mount in one["spec"]["containers"][0]["volumeMounts"]}:
                yield f"{one['spec']['containers'][0]['name']}: the models' folder {models} is no volume"
    if len(found) == 2:
        yield from _agree(manifest, found["head"], found["learner"])


def _agree(manifest: Manifest, service: ServiceConfig, train: TrainConfig) -> Iterator[str]:
    (front,), head = manifest.of("Service"), manifest.head["spec"]["containers"][0]
    ports = {port["name"]: port["containerPort"] for port in head["ports"]}
    (port,) = front["spec"]["ports"]
    target = ports.get(port["targetPort"])
    if target != service.port:
        yield f"Service: {port['targetPort']} is port {target}, and service.toml's {service.port}"
    address = f"{service.tls.scheme}://{front['metadata']['name']}:{port['port']}"
    if train.endpoint != address:
        yield f"train.toml: endpoint is {train.endpoint}, and the Service {address}"
    if train.model != service.model:
        yield f"train.toml: model is {train.model}, and service.toml's {service.model}"
    for name in ("startupProbe", "livenessProbe"):
        probe = head[name]["httpGet"]
        if ports.get(probe["port"]) != service.port or probe["scheme"] != service.tls.scheme.upper():
            yield f"{name}: asks {probe['scheme']} at {probe['port']}, and the front is {service.tls.scheme}"
        if probe["path"] not in OPEN_PATHS:
            yield f"{name}: {probe['path']} asks for a token"
    asked = re.search(r"(https?)://127\.0\.0\.1:(\d+)(/\S*)", head["readinessProbe"]["exec"]["command"][-1])
    if asked is None or (asked[1], asked[2]) != (service.tls.scheme, str(service.port)):
        yield f"readinessProbe: asks {asked and asked[0]}, and the front is {service.tls.scheme} at {service.port}"
    elif not any(same_path(asked[3], path) for path in document()["paths"]):
        yield f"readinessProbe: {asked[3]}: there is no such route"
    (policy,) = manifest.of("NetworkPolicy")
    *_, clients = policy["spec"]["ingress"]
    if [one["port"] for one in clients["ports"]] != [service.port]:
        yield f"NetworkPolicy: opens {clients['ports']}, and the front is at {service.port}"
    if not clients["from"][0]["podSelector"]["matchLabels"].items() <= manifest.learner["metadata"]["labels"].items():
        yield "NetworkPolicy: keeps the learner out"
    name = manifest.of("RayCluster")[0]["metadata"]["name"]
    for selector in (front["spec"]["selector"], policy["spec"]["podSelector"]["matchLabels"]):
        if selector["ray.io/cluster"] != name:
            yield f"{selector} selects no pod of {name}"
    yield from _room(manifest, service)


def _room(manifest: Manifest, service: ServiceConfig) -> Iterator[str]:
    nodes = []
    for group in manifest.cluster["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        node = {"CPU": float(limits["cpu"]), "GPU": float(limits.get("nvidia.com/gpu", 0))}
        nodes += [node] * group["replicas"]
        if not group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]:
            yield f"{group['groupName']}: replicas is not between minReplicas and maxReplicas"
    yield from filter(None, (shortfall(demand, nodes) for demand in demands_of(service, service.engine.device)))


def strict(schema: Resource) -> Resource:
    """A CRD's schema as the API server reads it with strict validation: it refuses unknown fields."""
    schema = copy.deepcopy(schema)

    def close(part: Any) -> None:
        if not isinstance(part, dict):
            return
        if "properties" in part and "additionalProperties" not in part:
            free = part.get("x-kubernetes-preserve-unknown-fields") or part.get("x-kubernetes-embedded-resource")
            part["additionalProperties"] = bool(free)
            for inner in part["properties"].values():
                close(inner)
        for key in ("items", "additionalProperties"):
            close(part.get(key))

    close(schema)
    schema["properties"]["metadata"].pop("additionalProperties", None)  # the API server's own
    return schema
