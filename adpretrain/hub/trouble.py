"""What goes wrong on the way to the Hub: what may pass is tried again, the rest becomes a ValueError with the fix."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")
WAITS = (0.5, 1.0, 2.0, 4.0, 8.0)  # seconds before each further try, to which up to half as much is added
LONGEST_WAIT = 60.0  # seconds, whatever the Hub asks for


def troubles() -> tuple[type[Exception], ...]:
    """What the client raises when a request fails, whichever library its version sends requests with.

    A RuntimeError wraps a failed upload; a JSONDecodeError is an answer from something that is not a Hub.
    """
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    transport = tuple(base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception))
    return OSError, RuntimeError, json.JSONDecodeError, EntryNotFoundError, *transport


def on_the_way(error: BaseException) -> bool:
    """Whether the Hub or the connection failed, not a file of this machine or what is in it."""
    from huggingface_hub.errors import HfHubHTTPError

    return isinstance(root(error), tuple(base for base in HfHubHTTPError.__bases__ if base is not OSError))


def root(error: BaseException) -> BaseException:
    """What was behind an error that the client has wrapped."""
    while isinstance(error, (RuntimeError, ValueError, FileNotFoundError)) and error.__cause__ is not None:
        if status(error) is not None:
            break
        error = error.__cause__
    return error


def status(error: BaseException) -> int | None:
    """The HTTP status of an answer, or None if there was no answer."""
    code = getattr(getattr(error, "response", None), "status_code", None)
    return code if isinstance(code, int) else None


def may_pass(error: BaseException) -> bool:
    """Whether the same request may succeed later: the Hub is busy or broken, or the connection was lost."""
    from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled

    if isinstance(error, FileNotFoundError):
        return False  # a download that the client has tried again itself
    error = root(error)
    code = status(error)
    if code is not None:
        return code in (408, 429) or code >= 500
    if isinstance(error, (LocalTokenNotFoundError, OfflineModeIsEnabled)):
        return False
    on_this_machine = isinstance(error, OSError) and error.errno is not None  # no space left, no permission, ...
    return not on_this_machine or isinstance(error, (ConnectionError, TimeoutError))


def persistently(call: Callable[[], T], landed: Callable[[], T | None] = lambda: None) -> T:
    """``call()``, tried again after `WAITS` for as long as its failure `may_pass`.

    ``landed``: asked after every failure whether the request took effect and only its answer was lost; if so it
    returns what ``call`` would have.
    """
    for wait in (*WAITS, None):
        try:
            return call()
        except troubles() as error:
            if not may_pass(error):
                raise
            if wait is not None:
                time.sleep(max(wait * random.uniform(1, 1.5), min(_asked_for(error), LONGEST_WAIT)))
            if (found := landed()) is not None:
                return found
            if wait is None:
                raise
    raise AssertionError("the last try returns or raises")


def _asked_for(error: BaseException) -> float:
    headers: Any = getattr(getattr(root(error), "response", None), "headers", {})
    asked = headers.get("Retry-After", "")
    return float(asked) if asked.isdigit() else 0.0


def explain(error: BaseException, repo_id: str, doing: str) -> ValueError:
    """The error for the user: what could not be done with a repository, why, and what to do."""
    return ValueError(f"cannot {doing} {repo_id}: {_reason(root(error), repo_id)}")


def _reason(error: BaseException, repo_id: str) -> str:
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    code, page, namespace = status(error), f"{constants.ENDPOINT}/{repo_id}", repo_id.partition("/")[0]
    tokens = f"{constants.ENDPOINT}/settings/tokens"
    if isinstance(error, LocalTokenNotFoundError):
        return f"no token is set. Make one with write access at {tokens}, then run `hf auth login` or set HF_TOKEN"
    if isinstance(error, OfflineModeIsEnabled):
        return f"HF_HUB_OFFLINE forbids to connect, and {constants.HF_HUB_CACHE} does not have it. Unset HF_HUB_OFFLINE"
    if isinstance(error, GatedRepoError):
        return f"it is gated. Ask for access at {page}, then use a token of that account (`hf auth login` or HF_TOKEN)"
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"it is neither a folder here nor a repository that can be reached at {constants.ENDPOINT}. Check the "
            "spelling; if it is private, log in with `hf auth login` or set HF_TOKEN"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"it has no such revision. {page} lists its branches, tags and commits"
    if code == 401:
        return f"the token is wrong or has expired. Make a new one at {tokens}; HF_TOKEN goes before `hf auth login`"
    if code == 403:
        return (
            f"the token may not do that in the namespace {namespace!r}. Use your own or an organisation's where you "
            f"may write, with a token of write access ({tokens})"
        )
    if code == 429:
        return "there were too many requests. Wait some minutes and try again"
    if code is not None and code >= 500:
        return f"the Hub is in trouble (status {code}, tried {len(WAITS) + 1} times). Try again later"
    first = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    if code is not None:
        return f"the Hub refuses (status {code}: {first})"
    if isinstance(error, json.JSONDecodeError):
        return f"{constants.ENDPOINT} does not answer like a Hub. Check HF_ENDPOINT and whether a proxy is in between"
    if isinstance(error, OSError) and error.errno is not None and not may_pass(error):
        return str(error)
    return f"no connection to {constants.ENDPOINT} ({first}). Check the network, HTTPS_PROXY and HF_ENDPOINT"
