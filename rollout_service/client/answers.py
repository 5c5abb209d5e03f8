"""Answers of the service as the client reads them: groups, statuses, and errors that say who answered what.

The client ignores unknown fields of answers, because the service may be newer. The service refuses unknown fields of
requests, because one may be a misspelt sampling parameter.
"""

import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from rollout_service.protocol import ErrorBody, Group

T = TypeVar("T", bound=BaseModel)

LONGEST_QUOTE = 300
"""characters that are quoted from an answer that is not the service's"""


class RolloutError(RuntimeError):
    """The service refused or failed a request.

    `status` is the HTTP status, and `body` is what the service said. `retry_after` is the seconds to wait before the
    next try, if the service says so. `failed` are the groups of a rollout stream that failed while others were
    delivered.
    """

    def __init__(
        self, status: int, body: ErrorBody, retry_after: float | None = None, failed: list[ErrorBody] | None = None
    ):
        self.status, self.body, self.retry_after, self.failed = status, body, retry_after, failed or []
        details = "".join(f"\n  {p.field}: {p.message}" for p in body.problems)
        details += "".join(f"\n  {failure.group}: {failure.error}" for failure in self.failed)
        super().__init__(f"{status}: {body.error}{details}")


def check(answer: httpx.Response, via: str = "") -> None:
    """Raises RolloutError when the status is not 200. `via` names the proxy in between, as `Route.via` does."""
    if answer.status_code != 200:
        raise error_of(answer, via)


def read(of: type[T], answer: httpx.Response, via: str = "") -> T:
    """The body of an answer as the type `of`. Raises RolloutError as `check` does, and when it is not of that type."""
    check(answer, via)
    try:
        return of.model_validate_json(answer.content, extra="ignore")
    except ValidationError as error:
        message = f"{_quoted(answer, via)}\nit is not a {of.__name__}: {error}"
        raise RolloutError(200, ErrorBody(error=message)) from error


def served_model(answer: httpx.Response, via: str = "") -> dict[str, Any]:
    """The first model in an answer of GET /v1/models, whose type is vLLM's. Raises RolloutError as `read` does."""
    check(answer, via)
    try:
        return json.loads(answer.content)["data"][0]
    except (ValueError, LookupError, TypeError) as error:
        raise RolloutError(200, ErrorBody(error=f"{_quoted(answer, via)}\nit is not a list of models")) from error


def error_of(answer: httpx.Response, via: str = "") -> RolloutError:
    """The error for an answer whose status is not 200 and whose body has been read."""
    try:
        body = ErrorBody.model_validate_json(answer.content, extra="ignore")
    except ValueError:
        body = ErrorBody(error=_quoted(answer, via))
    return RolloutError(answer.status_code, body, seconds_until(answer.headers.get("retry-after")))


def _quoted(answer: httpx.Response, via: str) -> str:
    """An answer that is not the service's, but comes from a gateway or from another server at this address."""
    kind = answer.headers.get("content-type", "no content type")
    text = " ".join(answer.text.split())[:LONGEST_QUOTE] or answer.reason_phrase
    return f"a gateway or another server answered, not a rollout service ({kind}){via}: {text}"


def seconds_until(retry_after: str | None) -> float | None:
    """Seconds to wait by a Retry-After header, which is a number or an HTTP date (RFC 9110, section 10.2.3). None when
    it is neither."""
    if retry_after is None:
        return None
    if re.fullmatch(r"\d+(\.\d+)?", retry_after):
        return float(retry_after)
    try:
        date = parsedate_to_datetime(retry_after)
    except ValueError:
        return None
    return max(0.0, (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds())


class GroupStream:
    """Finished groups from the bytes of a rollout stream, each as soon as its line is complete.

        for chunk in chunks: yield from stream.feed(chunk)
        yield from stream.end()

    Only a line feed ends a line, because text that a policy sampled may hold any other separator.
    """

    def __init__(self, requested: int):
        self.requested, self.delivered = requested, 0
        self.failed: list[ErrorBody] = []
        self.line: list[bytes] = []

    def feed(self, chunk: bytes) -> Iterator[Group]:
        """Raises RolloutError for a line that says that the stream could not be finished."""
        *whole, rest = chunk.split(b"\n")
        for part in whole:
            yield from self._group(b"".join([*self.line, part]))
            self.line = []
        self.line.append(rest)

    def end(self) -> Iterator[Group]:
        """The last group, if no line feed ended its line. Raises RolloutError when groups failed or are missing."""
        yield from self._group(b"".join(self.line))
        if self.delivered + len(self.failed) < self.requested:
            message = f"the stream was cut after {self.delivered + len(self.failed)} of {self.requested} groups"
            raise RolloutError(503, ErrorBody(error=message))
        if self.failed:
            message = f"{len(self.failed)} of {self.requested} groups failed"
            raise RolloutError(422, ErrorBody(error=message), failed=self.failed)

    def _group(self, line: bytes) -> Iterator[Group]:
        if not line.strip():
            return
        try:
            fields = json.loads(line)
            told = (ErrorBody if "error" in fields else Group).model_validate(fields, extra="ignore")
        except ValidationError as error:
            raise RolloutError(200, ErrorBody(error=f"a line of the stream is not a group: {error}")) from error
        except (ValueError, TypeError):
            quoted = line[:LONGEST_QUOTE].decode(errors="replace")
            raise RolloutError(503, ErrorBody(error=f"the stream was cut within a line: {quoted}")) from None
        if isinstance(told, Group):
            self.delivered += 1
            yield told
        elif told.group is not None:
            self.failed.append(told)
        else:
            raise RolloutError(503, told)
