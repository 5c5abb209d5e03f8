"""WireType, the base of every request's and answer's type; the body of an error; the interface's version."""

from pydantic import BaseModel, ConfigDict, Field

INTERFACE_VERSION = 1
"""raised by a change that breaks older clients, such as a new value where an answer's type lists all values. A new
field in an answer does not break them"""
VERSION_HEADER = "x-rollout-client"
"""header of a request with the client's INTERFACE_VERSION; a request without the header is served"""


class WireType(BaseModel):
    """Unknown fields of a request are errors, because a misspelt sampling parameter must not be ignored. The client
    reads answers with extra="ignore", because the service may be newer."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class Problem(WireType):
    """What is wrong with a request: the field (`groups.3.sampling.top_p`), and what to do."""

    field: str
    message: str


class ErrorBody(WireType):
    """Body of every 4xx and 5xx answer, except on OpenAI's routes. It is also a line of a rollout stream: in place of a
    group that failed, or as the last line of a stream that could not be finished."""

    error: str
    problems: list[Problem] = Field(default_factory=list)
    group: str | None = None
    """in a rollout stream: the id of the one group that failed; other groups are still delivered"""
