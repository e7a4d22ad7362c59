"""Scores that a language model gives: an OpenAI-compatible endpoint is asked about each completion, over plain HTTP."""

from __future__ import annotations

import functools
import hashlib
import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

TEMPLATE = """Question:
{prompt}

Reference answer:
{answer}

Answer to judge:
{completion}

Is the answer to judge right? Think about it, then end with "Score: " and a number from 0 (wrong) to 1 (right)."""
NAME = re.compile(r"\{(\w+)\}")
FIRST_WAIT_SECS, LONGEST_WAIT_SECS = 0.5, 30.0
TRY_AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)
MAX_REPLY_BYTES = 1 << 20


class Judge(NamedTuple):
    """An endpoint and how it is asked; the fields of config.reward.judge."""

    url: str
    model: str
    template: str
    pattern: str
    max_score: float
    max_tokens: int
    retries: int
    request_limit_secs: float
    concurrency: int
    cache: str
    api_key_env: str


def judge_score(completion: str, item: Mapping[str, Any], prompt: Any = None, **settings: Any) -> float:
    """Have one completion judged.

    Args:
      completion: the text. item: the row; the template may name its columns.
      prompt: text or chat messages. settings: the fields of `Judge`.
    Returns: the number in the reply, over max_score, in [0, 1].
    Raises: ConnectionError if the endpoint does not answer; ValueError if the reply has no such number.
    """
    return ask(Judge(**settings), completion, item, prompt)


def judge_scores(
    completions: Sequence[str], item: Mapping[str, Any], prompt: Any = None, **settings: Any
) -> list[float | BaseException]:
    """Have the completions of a prompt judged, `concurrency` at a time; as `judge_score`, with errors in the list.

    Args:
      completions: the texts. item: the row. prompt: text or chat messages. settings: the fields of `Judge`.
    Returns: for each completion its score, or what was raised.
    """
    judge = Judge(**settings)

    def try_one(completion: str) -> float | BaseException:
        # One that fails must not take the scores of the others with it.
        try:
            return ask(judge, completion, item, prompt)
        except Exception as error:
            return error

    with ThreadPoolExecutor(judge.concurrency) as pool:
        return list(pool.map(try_one, completions))


def ask(judge: Judge, completion: str, item: Mapping[str, Any], prompt: Any) -> float:
    """Ask about one completion, or look up what was said of it before.

    Args:
      judge: the endpoint. completion: the text. item: the row. prompt: text or chat messages.
    Returns: the score.
    Raises: as `judge_score`.
    """
    text = fill(judge.template or TEMPLATE, {**item, "prompt": as_text(prompt), "completion": completion})
    request = {
        "model": judge.model,
        "messages": [{"role": "user", "content": text}],
        "temperature": 0,
        "max_tokens": judge.max_tokens,
    }
    key = hashlib.sha256(json.dumps([judge.url, request], sort_keys=True).encode()).hexdigest()
    reply = _cached(judge.cache, key)
    if reply is None:
        reply = post(judge, request)
        read_score(judge, reply)  # what has no number in it is not kept
        _keep(judge.cache, key, reply)
    return read_score(judge, reply)


def fill(template: str, values: Mapping[str, Any]) -> str:
    """Put values into a template's {names}; braces around anything else stay, for instructions may show JSON."""
    # In one pass: a completion that writes {answer} is not given the answer.
    return NAME.sub(lambda match: str(values[match[1]]) if match[1] in values else match[0], template)


def as_text(prompt: Any) -> str:
    """Write a prompt as text; of a chat, the turns with their roles."""
    if isinstance(prompt, list | tuple):
        return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)
    return "" if prompt is None else str(prompt)


def read_score(judge: Judge, reply: str) -> float:
    """Read the last number that the pattern finds. Raises ValueError if there is none, or it is not in [0, max_score]."""
    found = re.findall(judge.pattern, reply)
    if not found:
        raise ValueError(f"the judge's reply has no score: {reply!r:.200}")
    score = float(found[-1])
    if not 0 <= score <= judge.max_score:
        raise ValueError(f"the judge's score {score:g} is not between 0 and {judge.max_score:g}")
    return score / judge.max_score


def post(judge: Judge, request: Mapping[str, Any]) -> str:
    """Send a request, again after a while where that may help.

    Args:
      judge: the endpoint. request: as its API takes it.
    Returns: the text of the reply.
    Raises: ConnectionError saying what the endpoint did at last.
    """
    wait_secs, what = FIRST_WAIT_SECS, ""
    for attempt in range(judge.retries + 1):
        if attempt:
            time.sleep(wait_secs)
            wait_secs = min(2 * wait_secs, LONGEST_WAIT_SECS)
        try:
            return _post_once(judge, request)
        except urllib.error.HTTPError as error:
            what = f"HTTP {error.code}: {error.read(300).decode('utf-8', 'replace')}"
            if error.code not in TRY_AGAIN:
                break
            wait_secs = _asked_wait(error.headers.get("Retry-After"), wait_secs)
        except (OSError, http.client.HTTPException) as error:
            what = str(error) or type(error).__name__
        except (ValueError, KeyError, IndexError, TypeError) as error:
            what = f"no chat completion in the reply ({type(error).__name__}: {error})"
    raise ConnectionError(f"{judge.url}: {what}")


def _post_once(judge: Judge, request: Mapping[str, Any]) -> str:
    """Send a request once; -> the text of the reply."""
    headers = {"Content-Type": "application/json"}
    key = os.environ.get(judge.api_key_env, "")
    if key:
        headers["Authorization"] = f"Bearer {key}"
    sent = urllib.request.Request(f"{judge.url.rstrip('/')}/chat/completions", json.dumps(request).encode(), headers)
    with urllib.request.urlopen(sent, timeout=judge.request_limit_secs) as response:
        said = json.loads(response.read(MAX_REPLY_BYTES))
    return str(said["choices"][0]["message"]["content"])


def _asked_wait(header: str | None, wait_secs: float) -> float:
    """Return the seconds that the endpoint asks to wait, or those of our own."""
    if header is not None and header.isdigit():
        return min(float(header), LONGEST_WAIT_SECS)
    return wait_secs


@functools.cache
def _replies(folder: str) -> dict[str, str]:
    """Return the replies that this process keeps in memory. folder: of those on disk."""
    del folder
    return {}


def _cached(folder: str, key: str) -> str | None:
    """Look a reply up, in memory and then on disk."""
    kept = _replies(folder)
    if key not in kept and folder:
        try:
            kept[key] = (Path(folder) / key).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
    return kept.get(key)


def _keep(folder: str, key: str, reply: str) -> None:
    """Keep a reply in memory, and on disk if there is a folder: other processes and later runs find it there."""
    _replies(folder)[key] = reply
    if folder:
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        # Under another name first: a reader never sees half of it.
        part = path / f"{key}.{os.getpid()}.part"
        part.write_text(reply, encoding="utf-8")
        part.replace(path / key)
