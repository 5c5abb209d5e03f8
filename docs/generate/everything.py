"""All generated files by path, each with its text."""

from pathlib import Path

from generate import configuration, http_api, llms, metrics, modules, patches, rooms, training_metrics
from generate.tree import DOCS


def generated() -> dict[Path, str]:
    """The list of pages comes last, since it shows the first sentence of each page."""
    pages = {
        **configuration.pages(),
        **http_api.pages(),
        "reference/metrics.md": metrics.page(),
        "reference/training-metrics.md": training_metrics.page(),
        **patches.pages(),
        **modules.pages(),
    }
    files = pages | {"rooms.svg": rooms.svg(), "llms.txt": llms.page(pages)}
    return {DOCS / path: text for path, text in files.items()}
