"""WithToken: the bearer token in the configuration of the service's commands and of its clients' commands.

It is given as `token`, in the file `token_file`, or in the environment variable ROLLOUT_SERVICE_TOKEN. The last two
keep it out of shared configurations and out of the list of processes. It is never printed.

WithAdminToken adds a second token in the same way, which only the service has: that of the control routes.
"""

import os
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator

VARIABLE = "ROLLOUT_SERVICE_TOKEN"
ADMIN_VARIABLE = "ROLLOUT_SERVICE_ADMIN_TOKEN"


class WithToken(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)

    token: SecretStr | None = Field(default=None, min_length=1)
    """bearer token of the service, which every route except /health asks for. When not given, it is read from
    token_file, else from the environment variable ROLLOUT_SERVICE_TOKEN"""
    token_file: Path | None = None
    """file that holds only the token"""

    @model_validator(mode="after")
    def _token_found(self) -> Self:
        self.token = found_token(self.token, self.token_file, "token", VARIABLE)
        return self


class WithAdminToken(WithToken):
    admin_token: SecretStr | None = Field(default=None, min_length=1)
    """bearer token of the control routes, which opens every other route too. A service with a token and without an
    admin token keeps the control routes closed. When not given, it is read from admin_token_file, else from the
    environment variable ROLLOUT_SERVICE_ADMIN_TOKEN"""
    admin_token_file: Path | None = None
    """file that holds only the admin token"""

    @model_validator(mode="after")
    def _admin_token_found(self) -> Self:
        # Without a token the variable is left to `launch`, because measurements and engines configure themselves too.
        variable = ADMIN_VARIABLE if self.token is not None else None
        self.admin_token = found_token(self.admin_token, self.admin_token_file, "admin_token", variable)
        if self.admin_token is not None:
            if self.token is None:
                raise ValueError("admin_token: " + NEEDS_TOKEN)
            if self.admin_token == self.token:
                raise ValueError("admin_token: must differ from `token`; choose another one")
        return self


NEEDS_TOKEN = "without a token every route is open, so an admin token would guard nothing; set token or token_file too"


def found_token(given: SecretStr | None, file: Path | None, field: str, variable: str | None) -> SecretStr | None:
    """The token of the field, the file, or the environment variable. Raises ValueError when field and file differ."""
    if file is not None:
        found = read_token(file, f"{field}_file")
        if given not in (None, found):
            raise ValueError(f"{field}_file: its token differs from `{field}`; give only one of them")
        return found
    if given is None and variable is not None and os.environ.get(variable):
        return SecretStr(os.environ[variable])
    return given


def read_token(file: Path, field: str) -> SecretStr:
    """The token in the file, without white space around it. Raises ValueError when there is none."""
    try:
        token = file.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ValueError(f"{field}: {file}: {error.strerror}") from error
    except UnicodeDecodeError:
        raise ValueError(f"{field}: {file} is not a text file; write only the token into it") from None
    if not token:
        raise ValueError(f"{field}: {file} is empty; write the token into it")
    return SecretStr(token)
