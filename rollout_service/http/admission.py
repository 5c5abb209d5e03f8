"""Admission: checks of a group before anything is generated. Every problem names its field."""

from collections.abc import Mapping, Sequence
from typing import Any

from rollout_service.http.openai_requests import BodyFields, openai_problems
from rollout_service.protocol import GroupRequest, Problem, RolloutRequest


class Refused(ValueError):
    """A request that is refused before anything is generated. `status` is the HTTP status of the answer."""

    def __init__(self, problems: list[Problem], status: int = 400):
        super().__init__(problems[0].message)
        self.problems, self.status = problems, status


def stopping() -> Refused:
    """The refusal of requests that arrive or still wait when the service is told to stop."""
    return Refused([Problem(field="service", message="the service is stopping")], status=503)


class Admission:
    """The limits of one service."""

    def __init__(
        self,
        name: str,
        tokenizer: Any,
        vocab_size: int,
        context_limit: int,
        drafting: bool,
        openai_fields: Mapping[str, BodyFields],
        on_cpu: bool = True,
        chat_template_kwargs: Mapping[str, Any] = {},
        routed_experts: bool = False,
    ):
        """`context_limit`: most tokens of prompt and response together. `drafting`: whether a drafter is on.
        `openai_fields`: the fields of vLLM's request types, by path. `chat_template_kwargs`: what the chat
        template gets in addition to the messages. `routed_experts`: whether engines record them."""
        self.name, self.tokenizer, self.vocab_size = name, tokenizer, vocab_size
        self.max_tokens, self.drafting, self.on_cpu = context_limit, drafting, on_cpu
        self.openai_fields, self.chat_template_kwargs = openai_fields, chat_template_kwargs
        self.routed_experts = routed_experts

    def check_model(self, name: str) -> None:
        """Raises Refused (404) for another name than the policy's."""
        if name != self.name:
            message = f"unknown model {name!r}; this service has {self.name!r}"
            raise Refused([Problem(field="model", message=message)], status=404)

    def admit(self, request: RolloutRequest) -> list[GroupRequest]:
        """The groups with their token ids and ids. Raises Refused with every problem of every group."""
        if request.model is not None:
            self.check_model(request.model)
        problems: list[Problem] = []
        names = names_of(request.groups, problems)
        groups = [self._admit(group, f"groups.{i}", names[i], problems) for i, group in enumerate(request.groups)]
        if problems:
            raise Refused(problems)
        return groups

    def _admit(self, group: GroupRequest, where: str, name: str, problems: list[Problem]) -> GroupRequest:
        try:
            field, ids = self._token_ids(group)
        except Exception as error:  # a chat template is code of the checkpoint, and raises for what it refuses
            problems.append(Problem(field=f"{where}.messages", message=f"the chat template refuses them: {error}"))
            return group
        if not ids:
            problems.append(Problem(field=f"{where}.{field}", message="is empty: give at least one token"))
        wrong = [token for token in ids if not 0 <= token < self.vocab_size]
        if wrong:
            message = f"token id {wrong[0]} is outside the vocabulary of {self.vocab_size}"
            problems.append(Problem(field=f"{where}.{field}", message=message))
        room = self.max_tokens - len(ids)
        if room < 1:
            message = f"has {len(ids)} tokens, too many: prompt and response together may have {self.max_tokens}"
            problems.append(Problem(field=f"{where}.{field}", message=message))
        elif group.sampling.max_tokens > room:
            message = f"{group.sampling.max_tokens} is too many: after a prompt of {len(ids)} tokens, give 1 to {room}"
            problems.append(Problem(field=f"{where}.sampling.max_tokens", message=message))
        if group.sampling.min_tokens > group.sampling.max_tokens:
            message = f"{group.sampling.min_tokens} is more than max_tokens, which is {group.sampling.max_tokens}"
            problems.append(Problem(field=f"{where}.sampling.min_tokens", message=message))
        if group.routed_experts and not self.routed_experts:
            message = "this service does not record them: launch it with engine.routed_experts = true, or leave it out"
            problems.append(Problem(field=f"{where}.routed_experts", message=message))
        plain = {"id": name, "prompt": None, "messages": None, "prompt_token_ids": ids}
        return group.model_copy(update=plain)

    def _token_ids(self, group: GroupRequest) -> tuple[str, list[int]]:
        if group.prompt_token_ids is not None:
            return "prompt_token_ids", group.prompt_token_ids
        if group.messages is not None:
            messages = [message.model_dump() for message in group.messages]
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **self.chat_template_kwargs
            )
            return "messages", self.tokenizer.encode(text, add_special_tokens=False)
        return "prompt", self.tokenizer.encode(group.prompt)

    def check_openai(self, path: str, body: dict[str, Any]) -> None:
        """Raises Refused for fields that vLLM's handler of this path would ignore, or pass on to an engine that cannot
        take them. Raises it also for fields that speculation cannot keep lossless. vLLM judges everything else."""
        problems = openai_problems(body, self.openai_fields[path], drafting=self.drafting, on_cpu=self.on_cpu)
        if problems:
            raise Refused(problems)


def names_of(groups: Sequence[GroupRequest], problems: list[Problem]) -> list[str]:
    """The groups' ids, which must differ. A group without an id gets its index, followed by as many underscores as
    distinguish it from the ids that were given."""
    given: dict[str, int] = {}
    for i, group in enumerate(groups):
        if group.id and given.setdefault(group.id, i) != i:
            message = f"{group.id!r} is also the id of groups.{given[group.id]}; give each group its own"
            problems.append(Problem(field=f"groups.{i}.id", message=message))
    names = []
    for i, group in enumerate(groups):
        name = group.id or str(i)
        while not group.id and name in given:
            name += "_"
        names.append(name)
    return names
