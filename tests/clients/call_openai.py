"""openai's client, as its documentation uses it: models, completions, chat, streams, log-probabilities, tools."""

from checks import MODEL, PROMPTS, Checks, equal
from openai import BadRequestError, NotFoundError, OpenAI

checks = Checks("openai")
client = OpenAI(base_url=f"{checks.endpoint}/v1", api_key="none", max_retries=0)
MESSAGES = [{"role": "user", "content": PROMPTS[0].strip()}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@checks.call("models.list, models.retrieve")
def models() -> str:
    equal([model.id for model in client.models.list()], [MODEL], "models")
    equal(client.models.retrieve(MODEL).id, MODEL, "the retrieved model")
    try:
        client.models.retrieve("another")
    except NotFoundError as error:
        return f"another model: {error.status_code}"
    raise AssertionError("a model that does not exist was found")


@checks.call("completions.create")
def completions() -> str:
    answer = client.completions.create(
        model=MODEL, prompt=PROMPTS, n=2, max_tokens=24, temperature=1.0, logprobs=2, seed=7
    )
    equal([choice.index for choice in answer.choices], [0, 1, 2, 3], "indices")
    for choice in answer.choices:
        logprobs = choice.logprobs
        assert logprobs is not None
        equal(len(logprobs.tokens), len(logprobs.token_logprobs), "log-probabilities")
        assert choice.finish_reason in ("stop", "length")
    tokens = sum(len(choice.logprobs.tokens) for choice in answer.choices)
    equal(answer.usage.completion_tokens, tokens, "usage")
    return "2 prompts, n = 2, logprobs, seed, usage"


@checks.call("completions.create, stream")
def completions_stream() -> str:
    asked = {"model": MODEL, "prompt": PROMPTS[0], "max_tokens": 24, "temperature": 0.0}
    whole = client.completions.create(**asked)
    chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)
    equal(text, whole.choices[0].text, "the streamed text")
    equal(chunks[-1].usage.completion_tokens, whole.usage.completion_tokens, "the streamed usage")
    return f"{len(chunks)} chunks, the same text and usage as without a stream"


@checks.call("completions.create, stop")
def stop() -> str:
    asked = {"model": MODEL, "prompt": PROMPTS[0], "max_tokens": 24, "temperature": 0.0}
    text = client.completions.create(**asked).choices[0].text
    word = text[len(text) // 2]
    choice = client.completions.create(**asked, stop=[word]).choices[0]
    equal((choice.text, choice.finish_reason), (text[: text.index(word)], "stop"), "the text before the stop")
    return f"ends before {word!r}"


@checks.call("chat.completions.create")
def chat() -> str:
    answer = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, n=2, max_tokens=24, temperature=1.0, logprobs=True, top_logprobs=2
    )
    tokens = 0
    for choice in answer.choices:
        equal(choice.message.role, "assistant", "the role")
        assert all(len(token.top_logprobs) >= 2 and token.logprob <= 0 for token in choice.logprobs.content)
        tokens += len(choice.logprobs.content)
    equal((len(answer.choices), answer.usage.completion_tokens), (2, tokens), "choices and usage")
    return "n = 2, logprobs, top_logprobs, usage"


@checks.call("chat.completions.create, stream")
def chat_stream() -> str:
    asked = {"model": MODEL, "messages": MESSAGES, "max_tokens": 24, "temperature": 0.0, "logprobs": True}
    whole = client.chat.completions.create(**asked).choices[0]
    chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**asked, stream=True) if chunk.choices]
    equal("".join(chunk.delta.content or "" for chunk in chunks), whole.message.content, "the streamed text")
    streamed = [token.logprob for chunk in chunks if chunk.logprobs for token in chunk.logprobs.content]
    equal(len(streamed), len(whole.logprobs.content), "streamed log-probabilities")
    return "the same text as without a stream, and a log-probability for each token"


@checks.call("chat.completions.create, tool_choice auto")
def tools() -> str:
    asked = {"model": MODEL, "messages": MESSAGES, "max_tokens": 24, "tools": [WEATHER]}
    choice = client.chat.completions.create(**asked, tool_choice="auto").choices[0]
    assert choice.finish_reason in ("stop", "length", "tool_calls")
    return "the demo's policy calls none"


@checks.call("a wrong request")
def wrong() -> str:
    try:
        client.completions.create(model=MODEL, prompt=PROMPTS[0], max_tokens=24, temperature=-1.0)
    except BadRequestError as error:
        refused = error.body
    else:
        raise AssertionError("a temperature of -1 was taken")
    equal(refused["param"], "temperature", "the field that the error names")
    return f"BadRequestError: {refused['message']}"
