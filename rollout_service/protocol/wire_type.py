"""WireType, of which every body is one; the body of an error; the interface's own version."""

from pydantic import BaseModel, ConfigDict, Field

INTERFACE_VERSION = 1
"""raised by a change that clients of the earlier number cannot live with, such as a new value where an answer's type
lists them all; a new field of an answer is no such change"""
VERSION_HEADER = "x-rollout-client"
"""of a request: the client's INTERFACE_VERSION; a client that does not say is served"""


class WireType(BaseModel):
    """In a request unknown fields are errors: a misspelt sampling parameter must not be ignored. The client reads
    answers with extra="ignore": the service may be newer."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class Problem(WireType):
    """What was wrong with a request: the field (`groups.3.sampling.top_p`), and what to do."""

    field: str
    message: str


class ErrorBody(WireType):
    """Body of every 4xx and 5xx answer but the OpenAI routes'; also a line of a rollout stream: in a group's place, or
    the last one of a stream that could not be finished."""

    error: str
    problems: list[Problem] = Field(default_factory=list)
    group: str | None = None
    """in a rollout stream: the id of the one group that failed; the others are delivered"""
