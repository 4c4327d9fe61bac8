"""Token ids of a document, as a server would give them to the model."""

from __future__ import annotations

from dataclasses import replace
from datetime import date
from typing import Any

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.evaluation.corpora.base import Document

_DAY = date(2026, 1, 1)  # for templates that tell the model today's: tokens must not change from day to day
ASKS = ("user", "tool")  # whoever speaks last so waits for the model


def beginning(tokenizer: Any) -> list[int]:
    """The BOS token, where the tokenizer starts a text with it; else nothing."""
    start = tokenizer("")["input_ids"][:1]
    return start if start and start[0] == tokenizer.bos_token_id else []


def opened(document: Document) -> Document:
    """A conversation up to the last message that waits for an answer; any other document as it is."""
    last = max((at for at, (role, _) in enumerate(document.messages) if role in ASKS), default=-1)
    return replace(document, messages=document.messages[: last + 1]) if last >= 0 else document


def token_ids(document: Document, tokenizer: Any) -> list[int]:
    """Of the document without `beginning`; a conversation goes through the checkpoint's chat template.

    Where its last message is a user's, the assistant's turn is opened (`add_generation_prompt`). One of our own
    corpora (`document.line` is empty) is plain text where the checkpoint has no template.

    Raises:
        UserError: a user's conversation that the template refuses or for which there is none.

    """
    if not document.messages or not (document.line or tokenizer.chat_template):
        return _encoded(tokenizer, document.text)[: document.tokens]
    if not tokenizer.chat_template:
        raise UserError(
            f"{document.line} has messages but the checkpoint's tokenizer has no chat template; give lines with text, "
            "or add the model's chat_template.jinja to its folder"
        )
    messages = [{"role": role, "content": content} for role, content in document.messages]
    try:
        text = tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=document.messages[-1][0] in ASKS,
            strftime_now=_DAY.strftime,
        )
    except Exception as error:  # a template raises what it likes
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"{document.line or document.id}: the checkpoint's chat template refuses these messages ({reason}); mend "
            "the roles or their order"
        ) from None
    ids, bos = _encoded(tokenizer, text), beginning(tokenizer)
    return ids[len(bos) :] if bos and ids[: len(bos)] == bos else ids


def _encoded(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids
