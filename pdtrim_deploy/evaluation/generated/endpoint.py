"""A served model's OpenAI endpoint: what it says of itself, and greedy chat replies."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.error import HTTPError

from pdtrim_deploy.errors import ServingError
from pdtrim_deploy.serving.client import explain, get, post_json

DEADLINE_S = 1800.0  # of a reply: prompts are long, and others are before it


@dataclass(frozen=True)
class Reply:
    """A text, its tokens, and why it ended: `stop` or `length`."""

    text: str
    reason: str
    tokens: int


@dataclass(frozen=True)
class Endpoint:
    """`context` is in tokens, of prompt and answer; None where the endpoint does not say."""

    url: str
    model: str = "default"
    context: int | None = None

    @classmethod
    def at(cls, url: str) -> Endpoint:
        """What answers at `url`, by `/v1/models`; any HTTP status is an answer.

        Raises:
            ServingError: nothing answers.

        """
        try:
            card = json.loads(get(f"{url.rstrip('/')}/v1/models", timeout_s=10.0))["data"][0]
            return cls(url, str(card["id"]), card.get("max_model_len"))
        except (HTTPError, ValueError, LookupError, TypeError, AttributeError):
            return cls(url)
        except OSError as error:
            raise ServingError(
                f"{url} does not answer ({explain(error)}); start what serves there, or check the port"
            ) from None

    def reply(self, messages: Sequence[dict[str, str]], max_tokens: int) -> Reply:
        """Greedy, behind a conversation; ServingError where there is none."""
        data = self._complete(messages, max_tokens)
        try:
            choice, tokens = data["choices"][0], int(data["usage"]["completion_tokens"])
            reply = Reply(choice["message"]["content"] or "", choice["finish_reason"], tokens)
        except (LookupError, TypeError, ValueError):
            raise ServingError(f"{self.url} gave no chat reply as OpenAI has it; give a router's URL") from None
        if reply.reason not in ("stop", "length"):
            raise ServingError(f"{self.url}: a reply ended for {reply.reason}; look into the logs of its workers")
        return reply

    def prompt_tokens(self, text: str) -> int:
        """Tokens that the model's chat template makes of a user's message; ServingError where it does not say."""
        try:
            return int(self._complete([{"role": "user", "content": text}], 1)["usage"]["prompt_tokens"])
        except (LookupError, TypeError, ValueError):
            raise ServingError(
                f"{self.url} does not say how many tokens a prompt has, by which long prompts are sized; serve with "
                "SGLang"
            ) from None

    def _complete(self, messages: Sequence[dict[str, str]], max_tokens: int) -> Any:
        body = {"model": self.model, "messages": list(messages), "max_tokens": max_tokens, "temperature": 0}
        try:
            return post_json(f"{self.url.rstrip('/')}/v1/chat/completions", body, DEADLINE_S)
        except OSError as error:
            raise ServingError(
                f"{self.url} gave no chat reply ({explain(error)}); look into the logs of its workers"
            ) from None
        except ValueError:
            raise ServingError(f"{self.url} gave a chat reply that is no JSON; give a router's URL") from None
