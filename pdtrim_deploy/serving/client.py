"""The least HTTP client for loopback servers: no proxy from the environment, a deadline on every call."""

from __future__ import annotations

import json
import urllib.request
from http.client import HTTPException
from typing import Any

_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def get(url: str, timeout_s: float) -> str:
    """The body of a 2xx answer; OSError (HTTPError for another status) otherwise."""
    return _ask(url, timeout_s).decode()


def post_json(url: str, body: dict[str, Any], timeout_s: float) -> Any:
    """The JSON of a 2xx answer; OSError (HTTPError for another status) or ValueError (no JSON) otherwise."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    return json.loads(_ask(request, timeout_s))


def _ask(request: str | urllib.request.Request, timeout_s: float) -> bytes:
    try:
        with _OPENER.open(request, timeout=timeout_s) as answer:
            body: bytes = answer.read()
            return body
    except HTTPException as error:  # not of OSError's family, but for one
        raise OSError(f"no whole HTTP answer ({type(error).__name__}: {error})") from error


def explain(error: OSError) -> str:
    """An error with the server's own words, where it sent any."""
    if isinstance(error, urllib.request.HTTPError):
        try:
            words = error.read(2000)
        except (OSError, HTTPException):  # cut off, or not there in time
            words = b""
        return f"HTTP {error.code}: {words.decode(errors='replace').strip()}"
    return str(getattr(error, "reason", error))
