"""A served model's OpenAI endpoint: what it says of itself, and greedy chat replies."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.error import HTTPError

from pdtrim_deploy.errors import ServingError, UserError
from pdtrim_deploy.serving.client import explain, get, post_json

BAD_REQUEST = 400
DEADLINE_S = 1800.0  # of a reply: prompts are long, and others are before it


class RefusedError(ServingError):
    """An HTTP 400: SGLang's answer to a prompt that its context does not hold, among others."""


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
        """Tokens that the model's chat template makes of a user's message.

        Raises:
            UserError: the message is longer than the served context.
            ServingError: no reply, or it does not say.

        """
        try:
            return int(self._complete([{"role": "user", "content": text}], 1)["usage"]["prompt_tokens"])
        except RefusedError as error:
            raise UserError(
                f"{error}; if the prompt is too long, give shorter --lengths or serve a model with a longer context"
            ) from None
        except (LookupError, TypeError, ValueError):
            raise ServingError(
                f"{self.url} does not say how many tokens a prompt has, by which long prompts are sized; serve with "
                "SGLang"
            ) from None

    def plan_digest(self) -> str | None:
        """Of the plan that its workers serve, which they call the version of their weights; None where they do not say.

        Raises:
            ServingError: no reply.

        """
        metadata = self._complete([{"role": "user", "content": "."}], 1).get("metadata") or {}
        version = metadata.get("weight_version")
        return version if isinstance(version, str) and re.fullmatch("[0-9a-f]{64}", version) else None

    def _complete(self, messages: Sequence[dict[str, str]], max_tokens: int) -> dict[str, Any]:
        body = {"model": self.model, "messages": list(messages), "max_tokens": max_tokens, "temperature": 0}
        try:
            data = post_json(f"{self.url.rstrip('/')}/v1/chat/completions", body, DEADLINE_S)
        except OSError as error:
            if isinstance(error, HTTPError) and error.code == BAD_REQUEST:
                raise RefusedError(f"{self.url} refused a chat request ({explain(error)})") from None
            raise ServingError(
                f"{self.url} gave no chat reply ({explain(error)}); look into the logs of its workers"
            ) from None
        except ValueError:
            data = None
        if not isinstance(data, dict):
            raise ServingError(f"{self.url} gave a chat reply that is no JSON object; give a router's URL")
        return data
