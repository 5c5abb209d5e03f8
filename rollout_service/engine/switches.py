"""Switches of a running engine: how drafts are drawn and verified. They are there on a CPU alone."""

from drafters.registry import DrafterConfig, make_drafter


def check_switches(started: DrafterConfig, asked: DrafterConfig, device: str) -> None:
    """Raises ValueError, with the field and both values, for what an engine on `device` that was started with one way
    cannot be switched to. Elsewhere than on a CPU vLLM decides both when it starts."""
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
