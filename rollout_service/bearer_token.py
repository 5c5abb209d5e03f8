"""WithToken: the bearer token in the configuration of the service's commands and of its clients' commands.

It is given as `token`, in the file `token_file`, or in the environment variable ROLLOUT_SERVICE_TOKEN. The last two
keep it out of shared configurations and out of the list of processes. It is never printed.
"""

import os
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator

VARIABLE = "ROLLOUT_SERVICE_TOKEN"


class WithToken(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)

    token: SecretStr | None = Field(default=None, min_length=1)
    """bearer token of the service, which every route except /health asks for. When not given, it is read from
    token_file, else from the environment variable ROLLOUT_SERVICE_TOKEN"""
    token_file: Path | None = None
    """file that holds only the token"""

    @model_validator(mode="after")
    def _token_found(self) -> Self:
        if self.token_file is not None:
            found = read_token(self.token_file)
            if self.token not in (None, found):
                raise ValueError("token_file: its token differs from `token`; give only one of them")
            self.token = found
        elif self.token is None and os.environ.get(VARIABLE):
            self.token = SecretStr(os.environ[VARIABLE])
        return self


def read_token(file: Path) -> SecretStr:
    """The token in the file, without white space around it. Raises ValueError when there is none."""
    try:
        token = file.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ValueError(f"token_file: {file}: {error.strerror}") from error
    except UnicodeDecodeError:
        raise ValueError(f"token_file: {file} is not a text file; write only the token into it") from None
    if not token:
        raise ValueError(f"token_file: {file} is empty; write the token into it")
    return SecretStr(token)
