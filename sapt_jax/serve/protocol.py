"""OpenAI's completions and chat completions: from a request's body to questions, and from answers to a response."""

import dataclasses
import json
import secrets
import time
from collections.abc import Sequence
from typing import Any

from sapt_jax.ask.answers import Answer
from sapt_jax.ask.questions import Asked, Question

MOST_CHOICES = 64
# Fields that change nothing here, and those that are taken at these values alone.
_IDLE = ("model", "user", "metadata", "store", "stream_options", "service_tier")
_ONLY: dict[str, tuple[Any, ...]] = {
    "stream": (None, False),
    "echo": (None, False),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "best_of": (None, 1),
    "suffix": (None, ""),
    "logit_bias": (None, {}),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
}
_SEARCH = ("temperature", "top_p", "seed", "beams")


class BadRequestError(ValueError):
    """A request that cannot be answered.

    Attributes:
      status: of the response.
      field: of the body that is at fault, or None.
    """

    def __init__(self, message: str, field: str | None = None, status: int = 400):
        super().__init__(message)
        self.field, self.status = field, status


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What a request wants.

    Attributes:
      questions: one for each prompt.
      choices: answers to each.
      search: arguments of `Model.search`.
      stop: an answer ends before the first of these.
    """

    questions: tuple[Question, ...]
    choices: int
    search: dict[str, Any]
    stop: tuple[str, ...]


def read_request(body: bytes, chat: bool, most_tokens: int) -> Wanted:
    """What a body wants.

    Raises:
      BadRequestError: naming the field that is missing, unknown, or of another form.
    """
    try:
        given = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadRequestError(f"the body is not JSON: {error}") from None
    if not isinstance(given, dict):
        raise BadRequestError(f"the body must be a JSON object, not {type(given).__name__}")
    limits = ("max_completion_tokens", "max_tokens")
    known = {*_IDLE, *_ONLY, *_SEARCH, *limits, "n", "stop", "task", "definition", "messages" if chat else "prompt"}
    for name, value in given.items():
        if name not in known:
            raise BadRequestError(f"{name} is not a field of this request; it has {', '.join(sorted(known))}", name)
        if name in _ONLY and value not in _ONLY[name]:
            raise BadRequestError(f"{name}={value!r:.60} is not supported: leave it out", name)
    for name in ("task", "definition"):
        if not isinstance(given.get(name), str | None):
            raise BadRequestError(f"{name} must be a text, not {given[name]!r:.60}", name)
    asked: Sequence[Asked] = [_messages(given)] if chat else _prompts(given)
    choices = given.get("n") if given.get("n") is not None else 1
    if type(choices) is not int or not 1 <= choices * len(asked) <= MOST_CHOICES:
        raise BadRequestError(f"n={choices!r:.60} times {len(asked)} prompts must be from 1 to {MOST_CHOICES}", "n")
    search = {name: given[name] for name in _SEARCH if given.get(name) is not None}
    for name in limits:
        if given.get(name) is not None:
            if type(given[name]) is not int or not 1 <= given[name] <= most_tokens:
                raise BadRequestError(f"{name}={given[name]!r:.60} must be from 1 to {most_tokens}", name)
            search["max_new_tokens"] = given[name]
    # Without a seed every request draws anew.
    search.setdefault("seed", secrets.randbits(32))
    questions = tuple(Question(one, given.get("task"), given.get("definition")) for one in asked)
    return Wanted(questions, choices, search, _stops(given))


def _prompts(given: dict[str, Any]) -> list[str]:
    prompt = given.get("prompt")
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, list) or not prompts or not all(isinstance(one, str) for one in prompts):
        raise BadRequestError(f"prompt must be a text or a list of texts, not {prompt!r:.60}", "prompt")
    return prompts


def _messages(given: dict[str, Any]) -> list[dict[str, Any]]:
    messages = given.get("messages")
    if not isinstance(messages, list) or not messages:
        raise BadRequestError(f'messages must be a list of {{"role", "content"}}, not {messages!r:.60}', "messages")
    return messages


def _stops(given: dict[str, Any]) -> tuple[str, ...]:
    stop = given.get("stop")
    stops = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or not all(isinstance(one, str) and one for one in stops):
        raise BadRequestError(f"stop must be a text or a list of texts, not {stop!r:.60}", "stop")
    return tuple(stops)


def write_response(wanted: Wanted, answers: Sequence[Answer], name: str, chat: bool) -> dict[str, Any]:
    """The response: the choices of the first prompt, then those of the next; each with its attention by task."""
    kind, prefix = ("chat.completion", "chatcmpl") if chat else ("text_completion", "cmpl")
    prompts = sum(answer.prompt_tokens for answer in answers[:: wanted.choices])
    new = sum(answer.new_tokens for answer in answers)
    return {
        "id": f"{prefix}-{secrets.token_hex(12)}",
        "object": kind,
        "created": int(time.time()),
        "model": name,
        "choices": [_choice(index, answer, wanted.stop, chat) for index, answer in enumerate(answers)],
        "usage": {"prompt_tokens": prompts, "completion_tokens": new, "total_tokens": prompts + new},
    }


def _choice(index: int, answer: Answer, stops: Sequence[str], chat: bool) -> dict[str, Any]:
    ends = [place for stop in stops if (place := answer.text.find(stop)) >= 0]
    text = answer.text[: min(ends)] if ends else answer.text
    content = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
    reason = "stop" if ends or answer.finished else "length"
    return {
        "index": index,
        **content,
        "finish_reason": reason,
        "logprobs": None,
        "attention": answer.attention,
        "cut": answer.cut,
    }


def write_error(message: str, field: str | None, status: int) -> dict[str, Any]:
    """The body of an error, as OpenAI's clients read it."""
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": field, "code": None}}
