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


def page() -> str:
    parts = [
        fill(
            "`rollout-service patches` prints the same and runs each self-test on your machine. An engine does not "
            "start with a vLLM that a patch was not written for, and the error names the function."
        )
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
        facts["Test"] = f"`{test}` in [{file}]({TO_ROOT}/{file})"
    facts["Unneeded when"] = marked(patch.unneeded)
    facts["File"] = f"[{patch.file}]({TO_ROOT}/{patch.file})"
    heading = ".".join(patch.name.split(".")[-2:])
    return "\n".join([f"### {heading}", "", *(f"- {name}: {said}" for name, said in facts.items())])
