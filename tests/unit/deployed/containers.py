"""Checks of a container file and of Compose files: what they name is there, and fits the project."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from check_jsonschema.builtin_schemas import get_builtin_schema
from deployed.configured import configurations
from documents.commands import same_path
from documents.pages import ROOT
from generate.http_api import document
from jsonschema import Draft202012Validator


class Containerfile:
    """Its instructions, in order, each with its arguments in one line."""

    def __init__(self, text: str):
        lines = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ").splitlines()
        words = [line.split() for line in lines if line]
        self.steps = [(instruction, " ".join(arguments)) for instruction, *arguments in words]

    def of(self, instruction: str) -> list[str]:
        return [arguments for word, arguments in self.steps if word == instruction]

    @property
    def arguments(self) -> dict[str, str]:
        return dict(argument.split("=") for argument in self.of("ARG"))

    @property
    def environment(self) -> dict[str, str]:
        return dict(word.split("=", 1) for words in self.of("ENV") for word in words.split())

    @property
    def installation(self) -> int:
        """The place of the step that installs the project."""
        (place,) = (i for i, (word, text) in enumerate(self.steps) if word == "RUN" and "make venv" in text)
        return place

    def copies(self, before: int | None = None) -> list[tuple[str, str]]:
        """(source, target) of what is copied from the checkout, before a step."""
        steps = [text.split() for word, text in self.steps[:before] if word == "COPY"]
        return [(source, words[-1]) for words in steps for source in words[:-1]]


def image(file: Containerfile) -> Iterator[str]:
    yield from (f"COPY {source}: there is no such path" for source, _ in file.copies() if not (ROOT / source).exists())
    if "EXTRA=${EXTRA} make venv" not in file.steps[file.installation][1]:
        yield f"the installation is {file.steps[file.installation][1]}"
    (folder,) = file.of("WORKDIR")
    if f"{folder}/.venv/bin" not in file.environment["PATH"].split(":"):
        yield f"the environment of {folder} is not in PATH"
    run = "\n".join(file.of("RUN"))
    if not re.search(rf"useradd .*--uid {file.of('USER')[-1]}\b", run):
        yield f"there is no user {file.of('USER')[-1]}"
    made = [folder for folders in re.findall(r"mkdir ([^&]*)", run) for folder in folders.split()]
    if file.environment["HF_HOME"] not in made:
        yield f"HF_HOME is {file.environment['HF_HOME']}, and the image makes {made}"


def substituted(text: str, given: dict[str, str]) -> str:
    """Compose's ${NAME:-default}."""
    return re.sub(r"\$\{(\w+):-([^}]*)\}", lambda found: given.get(found[1], found[2]), text)


def compose(data: dict[str, Any], file: Containerfile) -> Iterator[str]:
    for error in Draft202012Validator(get_builtin_schema("vendor.compose-spec")).iter_errors(data):
        yield f"{'.'.join(map(str, error.path))}: {error.message}"
    if "build" in data["services"]["service"]:
        yield from _services(data, file)


def _services(data: dict[str, Any], file: Containerfile) -> Iterator[str]:
    service, learner = data["services"]["service"], data["services"]["learner"]
    build, context = service["build"], ROOT / "deploy" / "cluster" / service["build"]["context"]
    if context.resolve() != ROOT or not (context / build["dockerfile"]).is_file():
        yield f"build: there is no {build['dockerfile']} in {build['context']}"
    yield from (f"build: the image has no argument {name}" for name in build["args"] if name not in file.arguments)
    if learner["image"] != service["image"]:
        yield "the learner runs another image"
    if learner.get("network_mode") != "service:service":
        yield "the learner does not share the service's network"
    for name, one in data["services"].items():
        yield from (f"{name}: no volume {v}" for v in one["volumes"] if v.split(":")[0] not in data["volumes"])
        if f"models:{file.environment['HF_HOME']}" not in one["volumes"]:
            yield f"{name}: the models' folder is no volume"
    try:
        (served,), (trained,) = configurations(service["command"]), configurations(learner["command"])
    except ValueError as error:
        yield str(error)
        return
    if urlsplit(trained.endpoint).port != served.port:
        yield f"the learner asks {trained.endpoint}, and the service listens at {served.port}"
    asked = urlsplit(service["healthcheck"]["test"][-1])
    if asked.port != served.port or not any(same_path(asked.path, path) for path in document()["paths"]):
        yield f"healthcheck: asks {asked.geturl()}, and the service listens at {served.port}"
    for name, one, path in (("service", service, served.state), ("learner", learner, trained.output)):
        if not any(Path(volume.split(":")[1]) in (path, *path.parents) for volume in one["volumes"]):
            yield f"{name}: {path} is on no volume"
