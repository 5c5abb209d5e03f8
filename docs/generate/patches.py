"""Pages of patches: the functions of vLLM that are replaced or wrapped, and why. Those that are wrong are in
docs/reference/patches.md, and what vLLM lacks is in docs/reference/additions.md."""

import tomllib
from collections import Counter

from generate.markdown import compose, fill, marked
from generate.markdown import table as markdown_table
from generate.tree import ROOT
from rollout_service.vllm_plugin import table
from rollout_service.vllm_plugin.patch import Patch

TO_ROOT = "../.."
"""from the page to the tree's root"""
WRONG = {
    "Wrong, incomplete or very slow on a CPU": table.DEFECTS,
    "Wrong on a GPU": table.DEFECTS_ON_A_GPU,
}
LACKING = {
    "In each of vLLM's processes": table.AT_LOADING,
    "Where it is used": table.ELSEWHERE,
}

STILL_NEEDED = """## Is a patch still needed?

A *self-test* tries vLLM's function on a few numbers, without the patch. If vLLM has no such function, the self-test
fails until it has one. `rollout-service patches` prints one of these for each patch:

| it prints | meaning |
|---|---|
| `fails without it here` | The patch is needed on this machine. |
| `PASSES WITHOUT IT here` | vLLM is right on this machine. If it is on every device of the patch, delete the patch. |
| `checks only that vLLM's functions are those …` | There is no self-test. Run the test. |

A *test* starts an engine, and fails without the patch. To see whether a new vLLM still needs the patch, write `return`
as the first line of the function that the table lists under "applied by" (for a class, of its `__init__`). Then run the
test, such as:

```sh
python -m pytest -n 0 tests/integration/test_core_server.py -k test_vllm_takes_its_core_process_from_it
```

If the test passes all the same, delete the patch: its code, and its name in the table. The test of
`Scheduler.update_from_output` takes the patch out itself. Its last line fails once vLLM does not need the patch.

To take another vLLM:

1. Change vLLM's version in `pyproject.toml`, and run `make venv`.
2. Run `rollout-service patches`, and the test of each patch that has no self-test.
3. Run `make test`. An error `… was written for … and must be adapted` names a function that has changed.

*When* says on which device a patch acts. On a GPU, vLLM has another model runner (V2)."""
"""how to find out, after an upgrade of vLLM, that a patch can go"""


def pages() -> dict[str, str]:
    """Raises AssertionError if two patches have the same heading."""
    names = Counter(map(_short, table.PATCHES))
    headings = {id(p): _short(p) if names[_short(p)] == 1 else f"{_short(p)} ({_module(p)})" for p in table.PATCHES}
    assert len(set(headings.values())) == len(table.PATCHES), "two patches have the same heading"
    parts = [
        fill(f"The patches are for vLLM {_vllm_version()}. The table lists them, and a section says more about each."),
        markdown_table(
            ["function of vLLM", "patch", "applied by", "device", "self-test"],
            [_row(p, headings[id(p)]) for p in table.PATCHES],
        ),
        fill(
            "`rollout-service patches` prints the same and runs each self-test on your machine. An engine does not "
            "start with a vLLM that a patch was not written for, and the error names the function."
        ),
        STILL_NEEDED,
    ]
    source = f"[the table of patches]({TO_ROOT}/rollout_service/vllm_plugin/table.py)"

    def sections(groups: dict[str, list[Patch]]) -> list[str]:
        return [
            part
            for group, patches in groups.items()
            for part in (f"## {group}", *(_section(patch, headings[id(patch)]) for patch in patches))
        ]

    return {
        "reference/patches.md": compose(
            "Patches of vLLM",
            "Every function of vLLM that is replaced or wrapped: why, when, how it is tested, and when the patch can "
            "go.",
            source,
            *parts,
            *sections(WRONG),
        ),
        "reference/additions.md": compose(
            "What vLLM lacks",
            "Patches that add to vLLM, each with its reason; the table of all patches is [another page](patches.md).",
            source,
            *sections(LACKING),
        ),
    }


def _short(patch: Patch) -> str:
    return ".".join(patch.name.split(".")[-2:])


def _module(patch: Patch) -> str:
    return patch.file.split("/")[-1].removesuffix(".py")


def _vllm_version() -> str:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    (version,) = {
        package.split("==")[1] for extra in extras.values() for package in extra if package.startswith("vllm")
    }
    return version


def _row(patch: Patch, heading: str) -> list[str]:
    anchor = "".join(c for c in heading.lower().replace(" ", "-") if c.isalnum() or c in "-_")
    device = "CPU" if "on a CPU" in patch.when else "GPU" if "on a GPU" in patch.when else "every device"
    test = f"`{patch.is_right.__name__}`" if patch.is_right is not None else "none: run its test"
    file = f"[{_module(patch)}]({TO_ROOT}/{patch.file})"
    page = "additions.md" if patch in [*table.AT_LOADING, *table.ELSEWHERE] else ""
    return [f"[{heading}]({page}#{anchor})", file, f"`{patch.apply.__name__}`", device, test]


def _section(patch: Patch, heading: str) -> str:
    """What the table does not say."""
    facts = {"Function": f"`{patch.name}`", "Why": marked(patch.reason), "When": marked(patch.when)}
    if patch.shown_by:
        file, test = patch.shown_by.split("::")
        facts["Test"] = f"`{test}` in [{file}]({TO_ROOT}/{file}) fails without the patch"
    facts["Unneeded when"] = marked(patch.unneeded)
    heading = f"`{heading}`" if "__" in heading else heading  # else Markdown takes it for bold
    return "\n".join([f"### {heading}", "", *(f"- {name}: {said}" for name, said in facts.items())])
