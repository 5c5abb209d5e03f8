"""The files of deploy/cluster fit their tools' schemas, this project's configuration, and each other."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "docs"))

from deployed import kubernetes  # noqa: E402
from deployed.containers import Containerfile, compose, image, substituted  # noqa: E402
from deployed.kubernetes import Manifest  # noqa: E402
from documents.commands import wrong_command  # noqa: E402
from documents.shell import commands_of  # noqa: E402

from drafters.files.toml_file import read_toml  # noqa: E402

FOLDER = ROOT / "deploy" / "cluster"
KUBERAY, SLURM, README = (FOLDER / name for name in ("kuberay.yaml", "slurm.sh", "README.md"))
CONTAINERFILE = (FOLDER / "Containerfile").read_text(encoding="utf-8")
IMAGE = Containerfile(CONTAINERFILE)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CRD = os.environ.get("KUBERAY_CRD")
"""file of KubeRay's own schema: `make test-crd` downloads it"""


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def changed(text: str, old: str, new: str) -> str:
    assert old in text, f"the test is out of date: there is no {old!r}"
    return text.replace(old, new, 1)


# --- Kubernetes ---


def secrets() -> dict[str, set[str]]:
    """The keys of each secret that the README makes."""
    made = re.findall(r"kubectl create secret generic (\S+) (.*)", text_of(README))
    return {name: set(re.findall(r"--from-(?:literal|file)=([\w.]+)", rest)) for name, rest in made}


def problems(text: str, root: Path) -> list[str]:
    manifest = Manifest(text)
    if found := [*kubernetes.schemas(manifest), *kubernetes.references(manifest, secrets())]:
        return found
    return list(kubernetes.configured(manifest, secrets(), IMAGE.environment["HF_HOME"], root))


def test_the_manifest_fits_kubernetes_kuberay_the_configuration_and_itself(tmp_path):
    assert problems(text_of(KUBERAY), tmp_path) == []


WRONG = [
    ("rayStartParams: {}           #", "rayStartParam: {}  #", "spec.headGroupSpec.rayStartParam: Extra inputs"),
    ("replicas: 2", 'replicas: "2"', "spec.workerGroupSpecs.0.replicas: Input should be a valid integer"),
    ("mode: token ", "mode: tokens ", "spec.authOptions.mode: Input should be 'disabled' or 'token'"),
    ("containerPort: 8000}", "containerPort: 8000, proto: TCP}", "'proto' was unexpected"),
    ("failureThreshold: 360", "failureTreshold: 360", "'failureTreshold' was unexpected"),
    ("accessModes: [ReadWriteOnce]", "accessMode: [ReadWriteOnce]", "'accessMode' was unexpected"),
    ("backoffLimit: 20", "backoffLimits: 20", "'backoffLimits' was unexpected"),
    ("secretName: rollouts-token", "secretName: rollout-token", "there is no secret rollout-token"),
    ("configMap: {name: rollouts}", "configMap: {name: rollout}", "there is no configMap rollout"),
    ("{key: ca.crt, path", "{key: ca.pem, path", "rollouts-tls has no ca.pem"),
    ("claimName: rollouts-state", "claimName: rollouts-queue", "there is no claim rollouts-queue"),
    ("- {name: state, mountPath: /state}", "", "volume state is mounted or there, not both"),
    ("    engines = 2 ", "    engine_count = 2 ", "engine_count: there is no such field"),
    ("endpoint =", "endpont =", "endpont: there is no such field"),
    ("    max_num_seqs = 128", "    max_num_seqs = 0", "engine.max_num_seqs: Input should be greater than"),
    ("certificate = ", "# certificate = ", "tls.certificate: a key needs the file of its certificate"),
    ("/etc/rollouts/tls/tls.key", "/etc/rollouts/tls.key", "tls.key: /etc/rollouts/tls.key: No such file"),
    ('ca_file = "/etc/rollouts/tls', 'ca_file = "/etc/rollouts/ca', "ca_file: /etc/rollouts/ca/ca.crt: No such file"),
    ("config/service.toml", "service.toml", "--config /etc/rollouts/service.toml: No such file"),
    ('state = "/state/', 'state = "/var/', "head: /var/qwen3-1.7b is on no volume"),
    ('output = "/runs/', 'output = "/models/', "learner: /models/qwen3-1.7b is not on a disk of its own"),
    ("- {name: models, mountPath: /models}", "- {name: models, mountPath: /hub}", "the models' folder /models is no"),
    ("port = 8000", "port = 8001", "Service: front is port 8000, and service.toml's 8001"),
    ("name: front, containerPort: 8000", "name: front, containerPort: 8080", "Service: front is port 8080"),
    ("targetPort: front", "targetPort: gcs-server", "Service: gcs-server is port 6379, and service.toml's 8000"),
    ("https://rollouts:8000", "https://rollout:8000", "train.toml: endpoint is https://rollout:8000, and the Service"),
    ("port: front, scheme: HTTPS", "port: gcs-server, scheme: HTTPS", "startupProbe: asks HTTPS at gcs-server"),
    ("path: /health", "path: /ready", "startupProbe: /ready asks for a token"),
    ("https://127.0.0.1:8000/ready", "https://127.0.0.1:8001/ready", "readinessProbe: asks https://127.0.0.1:8001"),
    ("127.0.0.1:8000/ready", "127.0.0.1:8000/redy", "readinessProbe: /redy: there is no such route"),
    ("protocol: TCP, port: 8000", "protocol: TCP, port: 80", "NetworkPolicy: opens"),
    ('rollouts/client: "true"\n      ports', 'client: "true"\n      ports', "NetworkPolicy: keeps the learner out"),
    ("    ray.io/node-type: head", "    ray.io/cluster: other", "selects no pod of rollouts"),
    ("    engines = 2 ", "    engines = 3 ", "3 engine(s) of 1 GPU(s) each need 3, but there are 2"),
    ("maxReplicas: 2", "maxReplicas: 1", "engines: replicas is not between minReplicas and maxReplicas"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "said"), WRONG)
def test_a_manifest_that_does_not_fit_is_found(old, new, said, tmp_path):
    assert said in "\n".join(problems(changed(text_of(KUBERAY), old, new), tmp_path))


def test_the_manifest_runs_one_image_as_its_user_with_the_projects_ray():
    manifest = Manifest(text_of(KUBERAY))
    assert len({template["spec"]["containers"][0]["image"] for template in manifest.templates}) == 1
    owners = {str(template["spec"]["securityContext"]["fsGroup"]) for template in manifest.templates}
    assert owners == {IMAGE.of("USER")[-1]}
    (ray,) = (one for one in PROJECT["dependencies"] if one.startswith("ray"))
    assert manifest.cluster["rayVersion"] == ray.partition("==")[2]


@pytest.mark.skipif(CRD is None, reason="make test-crd")
def test_the_cluster_fits_kuberays_own_schema():
    (version,) = (v for v in yaml.safe_load(text_of(Path(CRD)))["spec"]["versions"] if v["name"] == "v1")
    schema = kubernetes.strict(version["schema"]["openAPIV3Schema"])
    validator = jsonschema.Draft202012Validator(schema)
    (cluster,) = Manifest(text_of(KUBERAY)).of("RayCluster")
    assert [error.message for error in validator.iter_errors(cluster)] == []
    for old, new in (("rayStartParams: {}           #", "rayStartParam: {}  #"), ("replicas: 2", 'replicas: "2"')):
        (wrong,) = Manifest(changed(text_of(KUBERAY), old, new)).of("RayCluster")
        assert list(validator.iter_errors(wrong)), new


# --- the image ---


def test_the_image_copies_what_is_there_and_installs_as_the_makefile_does():
    assert list(image(IMAGE)) == []
    assert IMAGE.arguments["EXTRA"] in PROJECT["optional-dependencies"]
    assert re.findall(r"EXTRA=(\w+)", text_of(README) + CONTAINERFILE)
    for extra in re.findall(r"EXTRA=(\w+)", text_of(README) + CONTAINERFILE):
        assert extra in PROJECT["optional-dependencies"]


def test_the_images_python_is_the_makefiles():
    (base,) = IMAGE.of("FROM")
    (python,) = re.findall(r"^PYTHON \?= (.*)", text_of(ROOT / "Makefile"), re.MULTILINE)
    assert base.startswith(f"{python.replace('python', 'python:')}-")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("COPY drafters drafters", "COPY drafter drafters", "COPY drafter: there is no such path"),
        ("EXTRA=${EXTRA} make venv", "make venv", "the installation is"),
        ("PATH=/srv/rollout-service/", "PATH=/srv/", "the environment of /srv/rollout-service is not in PATH"),
        ("USER 1000", "USER 1001", "there is no user 1001"),
        ("HF_HOME=/models", "HF_HOME=/hub", "HF_HOME is /hub, and the image makes"),
    ],
)
def test_an_image_that_does_not_fit_is_found(old, new, said):
    assert said in "\n".join(image(Containerfile(changed(CONTAINERFILE, old, new))))


def installed(file: Containerfile, folder: Path) -> list[str]:
    """The packages that the installation would install from what is copied before it. No dependency is installed."""
    for source, target in file.copies(before=file.installation):
        to = folder / target / Path(source).name if target == "./" else folder / target
        to.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, to, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / source, to)
    build = "from setuptools.build_meta import prepare_metadata_for_build_editable as build; build('built')"
    script = f'set -e; make --dry-run venv; mkdir built; "{sys.executable}" -c "{build}"'
    done = subprocess.run(["bash", "-c", script], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        return []
    assert "uv pip install" in done.stdout
    (packages,) = folder.glob("built/*.dist-info/top_level.txt")
    return packages.read_text().split()


PACKAGES = ["drafters", "rl_loop", "rollout_service"]


def test_what_is_copied_before_the_installation_is_enough_for_it(tmp_path):
    assert installed(IMAGE, tmp_path) == PACKAGES


@pytest.mark.parametrize(
    "line", ["COPY deploy/overrides.txt deploy/overrides.txt\n", " Makefile", "COPY drafters drafters\n"]
)
def test_a_file_that_the_installation_misses_is_found(line, tmp_path):
    assert installed(Containerfile(changed(CONTAINERFILE, line, "")), tmp_path) != PACKAGES


# --- Compose ---

GPUS = {
    "EXTRA": "cuda",
    "SERVICE": "deploy/examples/qwen3-1.7b-8-gpus/service.toml",
    "TRAIN": "deploy/examples/qwen3-1.7b-8-gpus/train.toml",
}


def composed(name: str, given: dict[str, str], old: str = "", new: str = "") -> dict:
    return yaml.safe_load(substituted(changed(text_of(FOLDER / name), old, new), given))


@pytest.mark.parametrize("given", [{}, GPUS], ids=["cpu", "cuda"])
def test_compose_fits_its_schema_the_image_and_the_configuration(given, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert list(compose(composed("compose.yaml", given), IMAGE)) == []


def test_composes_gpus_are_the_engines_and_the_learners():
    data = composed("compose.cuda.yaml", GPUS)
    assert list(compose(data, IMAGE)) == []
    assert set(data["services"]) == set(composed("compose.yaml", GPUS)["services"])
    devices = {
        name: one["deploy"]["resources"]["reservations"]["devices"][0]["device_ids"]
        for name, one in data["services"].items()
    }
    assert len(devices["service"]) == read_toml(ROOT / GPUS["SERVICE"])["engines"]
    assert len({*devices["service"], *devices["learner"]}) == len(devices["service"]) + len(devices["learner"]) == 8
    for name, value in GPUS.items():
        assert f"{name}={value}" in text_of(README)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("stop_grace_period", "stop_grace", "services.service: Unevaluated properties are not allowed ('stop_grace'"),
        ("dockerfile: deploy/cluster/", "dockerfile: deploy/", "build: there is no deploy/Containerfile"),
        ("        EXTRA: ", "        EXTRAS: ", "build: the image has no argument EXTRAS"),
        ("network_mode: service:service", "network_mode: host", "does not share the service's network"),
        ("- state:/state", "- stat:/state", "service: no volume stat:/state"),
        ("models:/models", "models:/hub", "service: the models' folder is no volume"),
        ("--state /state", "--stat /state", "--stat: there is no such flag"),
        ("--state /state", "--state /var", "service: /var is on no volume"),
        ("--output /runs/rl", "--output runs/rl", "learner: runs/rl is on no volume"),
        ("127.0.0.1:8000/ready", "127.0.0.1:8001/ready", "healthcheck: asks http://127.0.0.1:8001/ready"),
        ("--resume", "--resume --endpoint http://127.0.0.1:9000", "the learner asks http://127.0.0.1:9000"),
    ],
)
def test_a_compose_file_that_does_not_fit_is_found(old, new, said, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert said in "\n".join(compose(composed("compose.yaml", {}, old, new), IMAGE))


# --- Slurm ---


def shell(text: str) -> str:
    """What bash and shellcheck have against a script."""
    beside = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    checker = shutil.which("shellcheck", path=beside)
    assert checker, "make venv installs shellcheck"
    said = [
        subprocess.run(command, input=text, capture_output=True, text=True)
        for command in (["bash", "-n"], [checker, "--shell=bash", "-"])
    ]
    return "".join(done.stdout + done.stderr for done in said if done.returncode)


def settings(text: str) -> dict[str, str]:
    """The script's variables, as it sets them when none is given."""
    return dict(re.findall(r"^(\w+)=\$\{\1:?-([^}]*)\}", text, re.MULTILINE))


def slurm_problems(text: str) -> list[str]:
    given = settings(text)
    filled = re.sub(r"\$(SERVICE|TRAIN)\b", lambda found: given[found[1]], text)
    return [problem for _, words in commands_of(filled) for problem in wrong_command(words, {})]


def test_the_slurm_script_is_right_for_bash_and_its_commands_for_the_project():
    assert shell(text_of(SLURM)) == ""
    assert slurm_problems(text_of(SLURM)) == []
    assert os.access(SLURM, os.X_OK)


@pytest.mark.parametrize(
    ("old", "new"), [("\nfi\n", "\n"), ('"$service" "$learner"', "$service $learer"), ("pids=()", "pids=(")]
)
def test_a_script_that_bash_or_shellcheck_refuses_is_found(old, new):
    assert shell(changed(text_of(SLURM), old, new))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("--ray_timeout", "--rey_timeout", "--rey_timeout: there is no such flag"),
        ("16-gpus/train.toml", "16-gpu/train.toml", "16-gpu/train.toml: there is no such file"),
        ("rl-loop train", "rl-loop learn", "rl-loop learn: there is no such command"),
    ],
)
def test_a_slurm_script_that_does_not_fit_is_found(old, new, said):
    assert said in "\n".join(slurm_problems(changed(text_of(SLURM), old, new)))


def test_slurms_gpus_are_the_engines_and_the_learners():
    text, given = text_of(SLURM), settings(text_of(SLURM))
    nodes, gpus = (int(re.findall(rf"#SBATCH --{name}=(\d+)", text)[0]) for name in ("nodes", "gpus-per-node"))
    first = given["ENGINE_GPUS"].split(",")
    assert len({*first, given["LEARNER_GPUS"]}) == len(first) + 1 == gpus
    service = read_toml(ROOT / given["SERVICE"])
    assert service["engines"] * service["engine"].get("tensor_parallel_size", 1) == len(first) + (nodes - 1) * gpus
