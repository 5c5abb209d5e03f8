"""Tokens: which routes ask for which bearer token."""

import secrets

from rollout_service.bearer_token import ADMIN_VARIABLE, WithAdminToken
from rollout_service.http.admission import Refused
from rollout_service.protocol import CONTROL_PATHS, Problem

OPEN_PATHS = frozenset({"/health", "/ping"})
"""paths that never ask for a token, for whatever restarts a service that does not answer"""


class Tokens:
    """A service without a token is open. With one, every other path asks for it, and control paths ask for the admin
    token. Without an admin token they are closed. The admin token opens every path."""

    def __init__(self, config: WithAdminToken):
        self.token = config.token.get_secret_value().encode() if config.token else None
        self.admin = config.admin_token.get_secret_value().encode() if config.admin_token else None

    def check(self, path: str, authorization: bytes) -> None:
        """Raises Refused: 401 for a token that is missing or wrong, 403 for one that does not open a control path.
        `authorization` is the value of the header, empty if there is none."""
        if self.token is None or path in OPEN_PATHS:
            return
        scheme, _, given = authorization.partition(b" ")
        given = given.strip().decode("latin-1").encode() if scheme.lower() == b"bearer" else b""
        if self.admin is not None and secrets.compare_digest(given, self.admin):
            return
        if not secrets.compare_digest(given, self.token):
            message = "this service asks for its token; send the header Authorization: Bearer <token>"
            raise Refused([Problem(field="Authorization", message=message)], status=401)
        if path in CONTROL_PATHS:
            raise _closed() if self.admin is None else _asks_for_admin()


def _closed() -> Refused:
    message = (
        "control routes are closed, because this service has a token and no admin token; set admin_token or "
        f"admin_token_file of the service, or its environment variable {ADMIN_VARIABLE}"
    )
    return Refused([Problem(field="Authorization", message=message)], status=403)


def _asks_for_admin() -> Refused:
    message = "control routes ask for the admin token (admin_token of the service), and this is the other token"
    return Refused([Problem(field="Authorization", message=message)], status=403)
