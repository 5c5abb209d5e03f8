"""The documents are true: their commands, configurations, code, links and names fit the tree."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "docs"))

from documents import checks  # noqa: E402
from documents.pages import Page  # noqa: E402
from generate import llms, metrics  # noqa: E402
from generate.everything import generated  # noqa: E402
from mkdocs.commands.build import build  # noqa: E402
from mkdocs.config import load_config  # noqa: E402

TRACKED = subprocess.run(
    ["git", "ls-files", "-co", "--exclude-standard", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True
)
NAMES = [name for name in TRACKED.stdout.split() if (ROOT / name).is_file()]
PAGES = [pytest.param(ROOT / name, id=name) for name in NAMES]


@pytest.mark.parametrize("file", PAGES)
def test_a_page_is_true(file):
    page = Page.read(file)
    assert [problem for check in checks.CHECKS for problem in check(page)] == []


def test_generated_pages_are_current():
    stale = [str(file) for file, text in generated().items() if not file.is_file() or file.read_text() != text]
    assert stale == [], "run make docs"


def test_the_list_of_pages_has_all_of_them():
    listed = (ROOT / "docs" / "llms.txt").read_text(encoding="utf-8")
    pages = [file.relative_to(ROOT / "docs") for file in (ROOT / "docs").rglob("*.md")]
    assert [str(page) for page in pages if f"]({page}): " not in listed] == []


def test_the_site_builds_without_a_warning(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path), strict=True))
    assert (tmp_path / "index.html").is_file()
    assert "<math " in (tmp_path / "losslessness.html").read_text(encoding="utf-8")
    outside = [file.name for file in tmp_path.rglob("*.html") if 'src="http' in file.read_text(encoding="utf-8")]
    assert outside == [], "these pages load something from another server"


def test_vllms_metrics_are_named_as_vllm_names_them():
    folder = checks.VLLM / "vllm" / "v1"
    source = "".join((folder / file).read_text() for file in ("metrics/loggers.py", "spec_decode/metrics.py"))
    assert [name for name in metrics.OF_VLLM if f'"{name.removesuffix("_total")}"' not in source] == []


def sh(line):
    return f"```sh\n{line}\n```\n"


def toml(text, title="service.toml"):
    return f'```toml title="{title}"\n{text}\n```\n'


SERVICE = 'model = "m"\n[drafter]\nkind = "ngram"'
RIGHT = [
    sh("make venv && EXTRA=cuda make test-queue  # a comment"),
    sh("rollout-service launch --config deploy/demo/service.toml --port 1 &"),
    sh("rollout-service launch \\\n  --config deploy/demo/service.toml \\\n  --drafter.kind none"),
    sh("rl-loop train --config FILE --endpoint URL --mode async > log.txt 2>&1"),
    sh("drafters train --kind eagle3 --policy p --data d.jsonl --out o\ndrafters inspect o"),
    sh("curl -d '{\n  \"n\": 1\n}' http://127.0.0.1:8000/v1/completions\nmake test"),
    sh("python -m pytest tests/unit/test_documents.py\nbash deploy/demo/run.sh"),
    sh("cat > x.toml <<'END'\ndon't read this\nEND\ncurl -s http://127.0.0.1:8000/v1/weights?run=a"),
    toml(SERVICE) + sh("rollout-service launch --config service.toml --drafter.prompt_lookup_max 3"),
    toml('[engine]\ndtype = "float32"\n'),
    toml('threads = 256\n[task]\nkind = "jsonl"\npath = "my.jsonl"', "train.toml"),
    toml('host = "0.0.0.0"\ntoken_file = "token"\n[tls]\ncertificate = "front.pem"\nkey = "front.key"'),
    "```python\nfrom rollout_service.client import RolloutClient\nawait x\n```\n",
    "```math\n\\frac{p(x)}{q(x)} \\le \\mathbb{E}[z]\n```\n",
    "`drafters/verification.py`, `rl_loop/loops/pulling.py: Puller.run`, `vllm/v1/spec_decode/metrics.py`",
    "Two steps:\n\n1. The first\n   goes on here.\n2. The second.",
    "`GET /v1/speculation`, `POST /v1/weights/policy?version=N`, `DELETE /v1/batches?run=`",
    "`rollout_groups_failed_total`, `rollout_speculation_alarms_total{kind}`, `rollout_service/telemetry.py`",
    "[code](rl_loop/config.py), [itself](#a-title), `make test-TOPIC`\n\n## A title\n",
]  # fmt: skip
WRONG = [
    (sh("make picture"), "make picture: there is no such target"),
    (sh("make FAULT=1 test-faults"), "make FAULT=: the Makefile has no such variable"),
    (sh("rollout-service lunch"), "rollout-service lunch: there is no such command"),
    (sh("rollout-service launch --config deploy/demo/service.toml --prot 1"), "--prot: there is no such flag"),
    (sh("rollout-service launch --config FILE --port 70000"), "port: Input should be less than or equal to 65535"),
    (sh("rl-loop train --config deploy/demo/training.toml"), "deploy/demo/training.toml: there is no such file"),
    (sh("rl-loop train --endpiont URL"), "--endpiont: there is no such flag"),
    (toml(SERVICE) + sh("rollout-service launch --config service.toml --drafter.model x"), "has no effect with kind"),
    (sh("python deploy/bench/no_such.py"), "deploy/bench/no_such.py: there is no such"),
    (sh("echo 'unended"), "a quotation does not end"),
    (sh("curl http://localhost:8000/v1/weight"), "/v1/weight: there is no such route"),
    ("`rollout-service audit --tolerance 1`", "--tolerance: there is no such flag"),
    ("`make fuzzy`", "make fuzzy: there is no such target"),
    ("```toml\nport = 1\n```\n", "title it with one of service.toml, train.toml"),
    (toml("prot = 1"), "prot: there is no such field; did you mean port?"),
    (toml("port = "), "no TOML"),
    (toml('[drafter]\nkind = "mtp"\nmodel = "x"'), "drafter.model: has no effect with kind = 'mtp'"),
    (toml('host = "0.0.0.0"'), "token: listening on 0.0.0.0 needs a token"),
    (toml('host = "0.0.0.0"\ntoken_file = "token"'), "tls: listening on 0.0.0.0 needs TLS"),
    ("```python\nfrom rollout_service.client import Client\n```\n", "there is no rollout_service.client.Client"),
    ("```python\nimport no_such_module\n```\n", "there is no no_such_module"),
    ("```python\nprint(\n```\n", "was never closed"),
    ("```math\n\\left( x\n```\n", "no formula"),
    ("```math\n\\nosuch x\n```\n", "the site cannot show \\nosuch"),
    ("[text](docs/no-such.md)", "docs/no-such.md leads nowhere"),
    ("[text](docs/architecture.md#no-such)", "there is no such heading"),
    ("`rl_loop/no_such.py`", "rl_loop/no_such.py: there is no such file"),
    ("`rl_loop/config.py: NoSuch`", "rl_loop/config.py has no NoSuch"),
    ("`GET /v1/rollouts`", "GET /v1/rollouts: there is no such route"),
    ("`rollout_groups_lost_total`", "rollout_groups_lost_total: there is no such metric"),
    ("The largest value is k +\n1. It is not reached.", "begins a list"),
    ("line\n" * 301, "has 301 lines, more than 300"),
]


@pytest.mark.parametrize("text", RIGHT)
def test_what_is_true_passes(text):
    page = Page(ROOT / "page.md", text)
    assert [problem for check in checks.CHECKS for problem in check(page)] == []


@pytest.mark.parametrize(("text", "said"), WRONG)
def test_what_is_wrong_is_found_by_one_check(text, said):
    page = Page(ROOT / "page.md", text)
    (found,) = filter(None, (list(check(page)) for check in checks.CHECKS))
    assert said in "\n".join(found)


@pytest.mark.parametrize("text", ["No title.\n", "# Title\n\nTwo. Sentences.\n\nMore.\n", "# Title\n\n- a list\n"])
def test_a_page_of_docs_begins_with_one_sentence(text):
    assert list(checks.first_sentence(Page(ROOT / "docs" / "page.md", text)))


def test_the_list_of_pages_reads_the_navigation():
    nav = [{"Use": ["a.md", {"More": [{"B": "b.md"}]}]}]
    assert list(llms.chapters(nav)) == [("Use", ["a.md", "b.md"])]
