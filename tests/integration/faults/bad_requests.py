"""Random bad requests, the same for the same seed: every route, every field at its extremes, broken bodies and heads.

Each begins as a request that a client could send, for a separate run, and is then damaged once or twice. Some stay
valid by chance. Their effects are harmless and are undone.
"""

import copy
import json
import random
import threading
from collections import Counter
from typing import Any, NamedTuple

import httpx

RUN = "bad"
GROUP = {
    "id": "a", "prompt": "1 + 1 =\n", "n": 1, "draft_steps": False, "metadata": {"a": [1]},
    "sampling": {
        "temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_tokens": 2, "min_tokens": 0, "stop": ["#"],
        "ignore_eos": False, "seed": 1,
    },
}  # fmt: skip
IDS = {"id": "b", "prompt_token_ids": [5, 6], "sampling": {"max_tokens": 2}}
CHAT = {"id": "c", "messages": [{"role": "user", "content": "1 + 1 ="}], "sampling": {"max_tokens": 2}}
OPENAI = {
    "model": "demo-policy", "max_tokens": 2, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "n": 1, "seed": 1,
    "stop": ["#"], "stream": False, "min_tokens": 0, "stop_token_ids": [3], "presence_penalty": 0.0,
    "frequency_penalty": 0.0, "repetition_penalty": 1.0, "ignore_eos": False, "return_token_ids": True,
    "allowed_token_ids": None, "bad_words": ["a"], "logit_bias": None, "min_p": 0.0, "prompt_logprobs": None,
    "truncate_prompt_tokens": None, "priority": 0, "cache_salt": "a", "logprob_token_ids": None, "user": "a",
    "stream_options": None, "response_format": None, "stream_interval": None, "vllm_xargs": None,
}  # fmt: skip
WEIGHTS = "/v1/weights/policy?version=1"
SAFETENSORS = {"Content-Type": "application/octet-stream"}
JSON = {"Content-Type": "application/json"}

SHORT: list[Any] = [
    None, True, False, 0, 1, -1, 0.5, 1e-9, 1e308, 2**31, 2**31 - 1, 2**32, 2**53, 2**63 - 1, 2**63, -(2**63) - 1,
    2**64, 10**30, "", "a", "5", "\x00", "\u2028", "é" * 300, "a" * 70_000, [], {}, [[]], [{}], [None], [-1], [2**64],
    ["a"] * 40, [5] * 600, {"a": {"b": None}}, {"type": "json_object"},
]  # fmt: skip
RAW = [
    b"NaN",
    b"-Infinity",
    b"1e999",
    b'"\\ud800"',
    b"9" * 5000,
    b"[" * 3000 + b"]" * 3000,
    b'"\xff"',
    b"",
    b"{",
    b"01",
]
"""text in the place of a value that no JSON library writes"""
MARK = "@@raw@@"


class Request(NamedTuple):
    method: str
    path: str
    body: bytes
    headers: dict[str, str]


class BadRequestGenerator:
    def __init__(self, seed: int):
        self.random = random.Random(seed)

    def next(self) -> Request:
        method, path, body, headers = self.random.choice(self._originals())
        if body is not None and self.random.random() < 0.8:
            content = self._hurt(copy.deepcopy(body))
        else:
            content = self.random.choice([b"", b"null", b"[]", b"{", bytes(range(256)), b'{"a": 1}', b"x" * 300_000])
        if self.random.random() < 0.002:
            content = b" " * (65 << 20)
        if self.random.random() < 0.1:
            headers = self.random.choice(
                [{}, {"Content-Type": "text/plain"}, JSON | {"Content-Encoding": "gzip"}, JSON | {"Accept": "x" * 4000}]
            )
        if self.random.random() < 0.1:
            path += ("&" if "?" in path else "?") + self.random.choice(["x=1", "run=a&run=b", "version=%ff", "%00=%00"])
        if self.random.random() < 0.05:
            method = self.random.choice(["GET", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "TRACE", "POST"])
        return Request(method, path, content, headers)

    def _originals(self) -> list[tuple[str, str, Any, dict[str, str]]]:
        number = self.random.choice([0, -1, 2**53, 2**63, 2**70, "a", "1.5", "", "%00"])
        name = self.random.choice(["x", "%00", "a" * 5000, "..%2f..", "é"])
        groups = [GROUP, IDS, CHAT]
        lease = {"run": RUN, "groups": 1, "wait": 0.0, "seconds": 1.0, "version": 0, "max_staleness": 0}
        completion = OPENAI | {"prompt": "1 + 1 =\n", "logprobs": 1, "echo": False, "suffix": None}
        chat = {"messages": CHAT["messages"], "logprobs": True, "top_logprobs": 1, "tools": None, "tool_choice": "none"}
        return [
            ("POST", "/v1/rollouts", {"groups": groups, "model": "demo-policy"}, JSON),
            ("POST", "/v1/prompts", {"groups": groups, "run": RUN, "priority": -9, "max_staleness": 0}, JSON),
            ("POST", "/v1/batches/lease", lease, JSON),
            ("POST", f"/v1/batches/{name}/ack", {"groups": ["a"]}, JSON),
            ("POST", f"/v1/batches/{name}/nack", {"groups": ["a"]}, JSON),
            ("POST", f"/v1/batches/{name}/extend", {"seconds": 1.0}, JSON),
            ("POST", "/v1/completions", completion, JSON),
            ("POST", "/v1/chat/completions", OPENAI | chat, JSON),
            ("POST", f"/v1/weights/policy?version={number}", {"file": "none.safetensors"}, JSON),
            ("POST", f"/v1/weights/{name}?version=1", None, SAFETENSORS),
            ("POST", f"{WEIGHTS}&checksum={number}", None, SAFETENSORS),
            ("DELETE", f"/v1/prompts?run={RUN}", None, {}),
            ("DELETE", f"/v1/batches?run={RUN}", None, {}),
            ("GET", f"/v1/models/{name}", None, {}),
            ("GET", f"/{name}", None, {}),
        ]

    def _hurt(self, body: Any) -> bytes:
        raw = b"0"
        for _ in range(self.random.choice([1, 1, 2])):
            container, key = self._somewhere(body)
            kind = self.random.random()
            if kind < 0.65:
                container[key] = copy.deepcopy(self.random.choice(SHORT))
            elif kind < 0.8:
                container[key], raw = MARK, self.random.choice(RAW)
            elif kind < 0.9:
                del container[key]
            elif isinstance(container, dict):
                container[str(key) + "x"] = self.random.choice(SHORT)
        return json.dumps(body).encode().replace(f'"{MARK}"'.encode(), raw)

    def _somewhere(self, body: Any) -> tuple[Any, Any]:
        """A container in the body, and a key or index in it. Deeper ones are as likely as the others."""
        places, left = [], [body]
        while left:
            container = left.pop()
            keys = list(container) if isinstance(container, dict) else list(range(len(container)))
            places += [(container, key) for key in keys if key not in ("run", "wait")]
            left += [container[key] for key in keys if isinstance(container[key], (dict, list))]
        return self.random.choice(places) if places else ({"": 0}, "")


class BadRequests(threading.Thread):
    """Sends `number` bad requests, or sends them until it is stopped. `unexpected` holds each answer that is neither a
    refusal nor right for a request that is valid by chance, and each request without an answer within WITHIN seconds.
    """

    WITHIN = 20.0

    def __init__(self, url: str, seed: int, number: int | None = None, pause: float = 0.0, may_be_down: bool = False):
        super().__init__(daemon=True)
        self.url, self.number, self.pause, self.may_be_down = url, number, pause, may_be_down
        self.generator = BadRequestGenerator(seed)
        self.answers: Counter[int] = Counter()
        self.unexpected: list[str] = []
        self.stopping = threading.Event()

    def run(self) -> None:
        with httpx.Client(base_url=self.url, timeout=self.WITHIN, trust_env=False) as client:
            while not self.stopping.wait(self.pause) and (self.number is None or self.answers.total() < self.number):
                request = self.generator.next()
                try:
                    answer = client.request(request.method, request.path, content=request.body, headers=request.headers)
                except httpx.TransportError as error:
                    if not self.may_be_down:
                        self._note(request, f"{type(error).__name__}: {error}")
                    self.answers[0] += 1
                    continue
                self.answers[answer.status_code] += 1
                if not self._is_expected(answer):
                    self._note(request, f"{answer.status_code} {answer.text[:300]}")

    def _is_expected(self, answer: httpx.Response) -> bool:
        if answer.status_code == 507 or (answer.status_code == 503 and self.may_be_down):
            return True
        if answer.status_code == 200 and answer.headers["content-type"] == "application/x-ndjson":
            lines = [json.loads(line) for line in answer.text.split("\n") if line]
            return self.may_be_down or not any("error" in line for line in lines)
        if not 200 <= answer.status_code < 500:
            return False
        return answer.status_code < 400 or answer.request.method == "HEAD" or "error" in answer.json()

    def _note(self, request: Request, what: str) -> None:
        self.unexpected.append(
            f"{request.method} {request.path[:100]} {request.headers} {request.body[:600]!r}: {what}"
        )

    def stop(self) -> None:
        self.stopping.set()
        self.join()
