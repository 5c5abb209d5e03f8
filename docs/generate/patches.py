"""Page of patches, docs/reference/patches.md: the functions of vLLM that are replaced or wrapped, and why."""

from generate.markdown import compose, fill, marked
from rollout_service.vllm_plugin import table
from rollout_service.vllm_plugin.patch import Patch

TO_ROOT = "../.."
"""from the page to the tree's root"""
GROUPS = {
    "Wrong or very slow on a CPU": table.DEFECTS,
    "What vLLM lacks, in each of its processes": table.AT_LOADING,
    "What vLLM lacks, where it is used": table.ELSEWHERE,
}

STILL_NEEDED = """## Is a patch still needed?

A *self-test* tries vLLM's function on a few numbers, without the patch. If vLLM has no such function, the self-test
fails until it has one. `rollout-service patches` prints one of these for each patch:

| it prints | meaning |
|---|---|
| `fails without it here` | The patch is needed on this machine. |
| `PASSES WITHOUT IT here` | vLLM is right on this machine. If it is on every device of the patch, delete the patch. |
| `checks only that vLLM's functions are those …` | There is no self-test. Run the test. |

A *test* starts an engine, and fails without the patch. To try a new vLLM, let the function that applies the patch
return at once (it is in the file that the patch names). Then run the test, such as:

```sh
python -m pytest -n 0 tests/integration/test_core_server.py -k test_vllm_takes_its_core_process_from_it
```

If the test passes all the same, delete the patch: its code, and its name in the table. The test of
`Scheduler.update_from_output` takes the patch out itself. Its last line fails once vLLM does not need the patch.

*When* says on which device a patch acts. On a GPU, vLLM has another model runner (V2). No patch changes that one."""
"""how to find out, after an upgrade of vLLM, that a patch can go"""


def page() -> str:
    parts = [
        fill(
            "`rollout-service patches` prints the same and runs each self-test on your machine. An engine does not "
            "start with a vLLM that a patch was not written for, and the error names the function."
        ),
        STILL_NEEDED,
    ]
    for group, patches in GROUPS.items():
        parts += [f"## {group}", *map(_section, patches)]
    return compose(
        "Patches of vLLM",
        "Every function of vLLM that is replaced or wrapped: why, when, how it is tested, and when the patch can go.",
        f"[the table of patches]({TO_ROOT}/rollout_service/vllm_plugin/table.py)",
        *parts,
    )


def _section(patch: Patch) -> str:
    facts = {"Function": f"`{patch.name}`", "Why": marked(patch.reason), "When": marked(patch.when)}
    if patch.is_right is not None:
        facts["Self-test"] = f"`{patch.is_right.__name__}`"
    if patch.shown_by:
        file, test = patch.shown_by.split("::")
        facts["Test"] = f"`{test}` in [{file}]({TO_ROOT}/{file}) fails without the patch"
    facts["Unneeded when"] = marked(patch.unneeded)
    facts["File"] = f"[{patch.file}]({TO_ROOT}/{patch.file})"
    heading = ".".join(patch.name.split(".")[-2:])
    return "\n".join([f"### {heading}", "", *(f"- {name}: {said}" for name, said in facts.items())])
