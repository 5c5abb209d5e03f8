"""Switches of a running engine: how drafts are sampled and verified. Only an engine on a CPU has them."""

from drafters.registry import DrafterConfig, make_drafter


def check_switches(started: DrafterConfig, asked: DrafterConfig, device: str) -> None:
    """Raises ValueError, with the field and both values, when an engine on `device` that was started as `started`
    cannot be switched to `asked`. On any device but a CPU, vLLM decides both when it starts."""
    if device == "cpu" or not asked.drafts:
        return
    differ = ["verification"] if asked.verification != started.verification else []
    if make_drafter(asked).samples and asked.draft_sampling != started.draft_sampling:
        differ.append("draft_sampling")
    for field in differ:
        before, after = getattr(started, field), getattr(asked, field)
        raise ValueError(
            f'{field}: an engine on {device} that was started with "{before}" cannot be switched to "{after}"; give '
            f'"{before}", or the endpoint of a service that was launched with "{after}"'
        )
