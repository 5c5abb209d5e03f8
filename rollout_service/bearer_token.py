"""WithToken: the service's bearer token in a command's configuration, of the service and of its clients alike.

It is given as `token`, in the file `token_file`, or in the environment's ROLLOUT_SERVICE_TOKEN. The last two are seen
neither in a configuration that is shared nor in the list of processes. It is never printed.
"""

import os
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator

VARIABLE = "ROLLOUT_SERVICE_TOKEN"


class WithToken(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)

    token: SecretStr | None = Field(default=None, min_length=1)
    """bearer token of the service, which every route but /health asks for; when not given that in token_file, else that
    of the environment's ROLLOUT_SERVICE_TOKEN"""
    token_file: Path | None = None
    """file that holds the token and nothing else"""

    @model_validator(mode="after")
    def _token_found(self) -> Self:
        if self.token_file is not None:
            found = read_token(self.token_file)
            if self.token not in (None, found):
                raise ValueError("token_file: holds another token than `token`; give one of them")
            self.token = found
        elif self.token is None and os.environ.get(VARIABLE):
            self.token = SecretStr(os.environ[VARIABLE])
        return self


def read_token(file: Path) -> SecretStr:
    """Without the white space around it. Raises ValueError when there is none."""
    try:
        token = file.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ValueError(f"token_file: {file}: {error.strerror}") from error
    except UnicodeDecodeError:
        raise ValueError(f"token_file: {file}: is no text") from None
    if not token:
        raise ValueError(f"token_file: {file}: is empty")
    return SecretStr(token)
