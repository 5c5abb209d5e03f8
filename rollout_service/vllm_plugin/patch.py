"""Patch: a function of vLLM that is replaced or wrapped, and the test that tells whether it still has to be."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pkgutil import resolve_name
from typing import Any

APPLIED: list[str] = []
"""names of the patches that are in place in this process"""


@dataclass(frozen=True)
class Patch:
    """A row of the table (table.py).

    A self-test tries the function on a few numbers. It decides whether the patch is applied, and so tells when it is no
    longer needed. If only a running engine shows the effect, an integration test fails without the patch instead.
    """

    name: str
    """vLLM's function, by its full dotted name"""
    reason: str
    """what is wrong with it, or what it lacks"""
    when: str
    """where it is replaced or wrapped"""
    unneeded: str
    """what must be true of vLLM before the patch can go"""
    apply: Callable[..., Any]
    is_right: Callable[[], bool] | None = None
    """the self-test"""
    shown_by: str = ""
    """file::test of the integration test that fails without the patch"""
    relies_on: Mapping[str, str] = field(default_factory=dict)
    """functions of vLLM, by full dotted name, with the names of their parameters; ", ..." for any that follow"""
    looked_up_in: Mapping[str, str] = field(default_factory=dict)
    """functions of vLLM, by full dotted name, and what each must still look up for the patch to have an effect"""

    @property
    def file(self) -> str:
        return self.apply.__module__.replace(".", "/") + ".py"

    def ensure(self) -> bool:
        """Apply it once in this process, unless vLLM's own function passes the self-test. Returns whether it was
        applied now. Raises RuntimeError when vLLM's functions are not what it relies on, and when it does not help."""
        if self.name in APPLIED:  # vLLM loads its plugins more than once in a process
            return False
        if self.passes():
            return False
        self.check()
        self.apply()
        if self.is_right is not None and not self.is_right():
            raise RuntimeError(f"{self.name} fails its self-test even when replaced: refusing to serve wrong samples")
        APPLIED.append(self.name)
        return True

    def apply_to(self, *arguments: Any) -> None:
        """Apply it to one object of vLLM's. Raises RuntimeError when vLLM's functions are not what it relies on."""
        self.check()
        self.apply(*arguments)

    def passes(self) -> bool:
        """Whether there is a self-test, and vLLM's function as it is now passes it."""
        try:
            return self.is_right is not None and self.is_right()
        except Exception:
            return False

    def check(self) -> None:
        """Raises RuntimeError, with the full name, unless vLLM's functions are those that the patch was written for."""
        for name, parameters in self.relies_on.items():
            found = ", ".join(inspect.signature(self._function(name)).parameters)
            begins = parameters.endswith("...") and f"{found}, ".startswith(parameters.removesuffix("..."))
            if found != parameters and not begins:
                raise RuntimeError(f"{name}({found}): {self.file} was written for ({parameters}) and must be adapted")
        for name, used in self.looked_up_in.items():
            if used not in self._function(name).__code__.co_names:
                raise RuntimeError(f"{name} no longer looks up {used}: {self.file} has no effect and must be adapted")

    def _function(self, name: str) -> Any:
        try:
            return resolve_name(name)
        except (ImportError, AttributeError) as error:
            raise RuntimeError(f"{name}: vLLM has no such function; {self.file} must be adapted") from error


def defect(name: str, reason: str, is_right: Callable[[], bool], apply: Callable[[], None]) -> Patch:
    """The patch of a function that is wrong or very slow on a CPU."""
    return Patch(
        name,
        reason,
        when="on a CPU when the plugin is loaded, if it fails its self-test",
        unneeded="it passes its self-test",
        apply=apply,
        is_right=is_right,
    )
