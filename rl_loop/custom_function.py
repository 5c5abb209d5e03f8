"""Custom functions: the user's own, named in the configuration as `package.module:function`."""

import importlib
import inspect
import re
import sys
import traceback
from collections.abc import Callable
from typing import Any

PATH = re.compile(r"[\w.]+:\w+")
OF_PYTHON = ("<frozen importlib", importlib.__file__)


class CustomFunctionError(ValueError):
    """The function cannot be loaded, or does not take its arguments. The message names the field."""


def load_function(path: str, field: str, takes: str, *arguments: Any, **named: Any) -> Callable[..., Any]:
    """The function at `path`. It must be callable with these arguments, which `takes` describes in words. Modules in
    the working folder are found. Raises CustomFunctionError, with the line of the user's code that raised."""
    module, _, name = path.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise CustomFunctionError(f"{field}: {path}: {error}{_where(error)}") from error
    except (Exception, SystemExit) as error:  # importing runs the user's code, which may raise anything
        said = " ".join(str(error).split())  # pydantic's errors have several lines
        raise CustomFunctionError(f"{field}: {path}: {type(error).__name__}: {said}{_where(error)}") from error
    if not callable(function):
        raise CustomFunctionError(f"{field}: {path}: not a function")
    try:
        inspect.signature(function).bind(*arguments, **named)
    except TypeError as error:
        raise CustomFunctionError(f"{field}: {path}: must take {takes}: {error}") from error
    except ValueError:  # a function written in C may have no signature
        pass
    return function  # type: ignore[no-any-return]


def _where(error: BaseException) -> str:
    """The line of the user's code that raised. Empty if no user code raised, or if the error itself names the line."""
    own = [f for f in traceback.extract_tb(error.__traceback__)[1:] if not f.filename.startswith(OF_PYTHON)]
    return f" ({own[-1].filename}, line {own[-1].lineno})" if own and not isinstance(error, SyntaxError) else ""
