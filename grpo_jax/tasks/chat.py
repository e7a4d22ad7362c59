"""A chat as the model reads it: the template with its arguments and its date, and what it has begun of the answer."""

from __future__ import annotations

import datetime
import difflib
import itertools
import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grpo_jax.config import TaskConfig
from grpo_jax.errors import UserError

Message = Mapping[str, Any]  # {"role": ..., "content": ...}, a text

_log = logging.getLogger(__name__)
_PROBE = "Zebra"  # a text that no template has of its own
_DATE = re.compile(r"""strftime_now\(\s*(?P<quote>["'])(?P<format>.*?)(?P=quote)\s*\)""")
# Where a model's reasoning begins or ends; a template may write it behind every assistant's header.
_REASONING = re.compile(r"</?(?:seed:)?(?:think|thinking|thought|reasoning|reason)>|\[/?THINK\]")
_TAG = re.compile(r"<(?![/\s])[^<>]*>|\[[A-Z]+\]")
_OPENED_LAST = re.compile(r"(?:<[A-Za-z][\w:-]*>|\[THINK\])\s*\Z")
# How the templates of the main families begin a turn.
_MARKUP = (
    "<|im_start|>",
    "<|start_header_id|>",
    "<start_of_turn>",
    "[INST]",
    "<|user|>",
    "<|assistant|>",
    "<\uff5cUser\uff5c>",  # DeepSeek's bars are full-width
    "<|start|>",
)


class ChatTemplate:
    """Writes chats by a tokenizer's chat template, with the arguments and the date of config.task.

    Where the template has no system role, a system message becomes the beginning of the user's first turn. Where it reads
    contents as lists of parts alone, as those of many vision models do, they are given as such.

    Args:
      config: config.task. tokenizer: a HFTokenizer.
    Raises: UserError naming an argument that the template does not read, or if it leaves out what the user says.
    """

    def __init__(self, config: TaskConfig, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._arguments: dict[str, Any] = json.loads(config.chat_template_kwargs or "{}")
        self._template: str | None = None  # the tokenizer's own
        own = tokenizer.chat_template
        _check_arguments(own, self._arguments)
        if writes_date(own):
            self._template = with_date(own, config.template_date)
        self._has_system_role: bool | None = None
        self._header: str | None = None
        self._has_warned = False
        self._as_parts = False
        self._as_parts = self._wants_parts()

    def __call__(self, messages: Sequence[Message]) -> str:
        """Return the text of a prompt, up to where the assistant begins to speak."""
        if messages[0]["role"] == "system" and not self.has_system_role:
            messages = merge_system(messages)
        text = self._render(messages)
        changed = next((each for each in messages if each["role"] == "user" and each["content"].strip() not in text), None)
        if changed is not None and not self._has_warned:
            self._has_warned = True
            _log.warning("the chat template changes or leaves out what the user says: %.60r", changed["content"])
        return text

    def _wants_parts(self) -> bool:
        """Tell if the template reads contents as lists of parts alone. Raises UserError if it leaves out what the user says."""
        user = {"role": "user", "content": _PROBE}
        try:
            if _PROBE in self._render([user]):
                return False
        except UserError:  # it may refuse this chat, or text
            pass
        self._as_parts = True
        try:
            if _PROBE in self._render([user]):
                return True
        except UserError:
            return False  # what it refuses is said with the first question's place
        raise UserError("the chat template leaves out what the user says; give another one in config.task.chat_template")

    @property
    def has_system_role(self) -> bool:
        """True if the text of a system message comes through."""
        # Some templates raise, some leave it out without a word.
        if self._has_system_role is None:
            try:
                text = self._render([{"role": "system", "content": _PROBE}, {"role": "user", "content": "x"}])
                self._has_system_role = _PROBE in text
            except UserError:
                self._has_system_role = False
            if not self._has_system_role:
                _log.warning("the chat template has no system role: the system text begins the user's first turn")
        return self._has_system_role

    @property
    def header(self) -> str:
        """The text that begins an assistant's turn, as `<|im_start|>assistant`; empty if it cannot be told."""
        if self._header is None:
            self._header = self._find_header()
        return self._header

    def opened(self, text: str) -> str:
        """Return what a prompt's text has begun of the assistant's turn, from its first tag on; empty for none."""
        start = text.rfind(self.header) + len(self.header)
        if not self.header or start < len(self.header):
            return opened_last(text)
        return from_first_tag(text[start:])

    def markup(self) -> tuple[str, ...]:
        """Return the marks of turns in this template and of the main families."""
        written = self._render([{"role": "user", "content": _PROBE}])
        specials = [self._tokenizer.token(i) for i in sorted(self._tokenizer.special_ids)]
        prefix = [self._tokenizer.token(i) for i in self._tokenizer.prompt_prefix]
        own = [token for token in specials if token in written and token not in prefix and not _REASONING.fullmatch(token)]
        return tuple(dict.fromkeys([*own, *_MARKUP]))

    def _find_header(self) -> str:
        """Compare a turn that is asked for with one of the past: what both begin with is the header."""
        user, answer = {"role": "user", "content": "x"}, {"role": "assistant", "content": _PROBE}
        try:
            before = self._render([user], add_generation_prompt=False)
            asked = self._render([user])
            # A turn of the past, with another behind it: a template writes reasoning into the last turn alone.
            past = self._render([user, answer, user], add_generation_prompt=False)
        except UserError:
            return ""
        if not asked.startswith(before):
            return ""
        header = _common_prefix(asked, past)[len(before) :]
        return header[: _end_before(_REASONING, header)]

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        if self._as_parts:
            messages = [{**each, "content": [{"type": "text", "text": each["content"]}]} for each in messages]
        return self._tokenizer.render_chat(
            messages, template=self._template, add_generation_prompt=add_generation_prompt, **self._arguments
        )


def merge_system(messages: Sequence[Message]) -> list[Message]:
    """Put the system message's text before that of the first user's message."""
    system, rest = messages[0], [dict(message) for message in messages[1:]]
    first = next((message for message in rest if message["role"] == "user"), None)
    if first is None:
        return [{"role": "user", "content": system["content"]}, *rest]
    first["content"] = f"{system['content']}\n\n{first['content']}"
    return [*rest]


def template_writes_date(path: str, chat_template: str) -> bool:
    """Tell if the chat template of a model writes the day it is used on, without loading its tokenizer.

    Args:
      path: of the model. chat_template: file of a template in place of its own, or empty.
    """
    from grpo_jax.models.folders import resolve  # here, for the embedded task needs none of it

    files = [Path(chat_template).expanduser()]
    if not chat_template:
        folder = resolve(path)
        files = [folder / "tokenizer_config.json", *folder.glob("chat_template*"), *folder.glob("additional_chat_templates/*")]
    return any(writes_date(file.read_text(encoding="utf-8", errors="replace")) for file in files if file.is_file())


def today() -> datetime.date:
    """Return the day of this process's clock."""
    return datetime.date.today()


def writes_date(template: str) -> bool:
    """Tell if a template writes the day it is used on."""
    return "strftime_now" in template


def with_date(template: str, day: str) -> str:
    """Fix the day that a template writes.

    Args:
      template: that calls `strftime_now`. day: as 2026-11-26; empty: today.
    Returns: the template with the dates written out.
    """
    # In the template's text, since transformers hands no functions on to a template.
    date = datetime.date.fromisoformat(day) if day else today()
    fixed = _DATE.sub(lambda call: json.dumps(date.strftime(call["format"]), ensure_ascii=False), template)
    if "strftime_now(" in fixed:
        _log.warning("the chat template computes the date in a way that cannot be fixed: prompts differ from day to day")
    return fixed


def opened_last(text: str) -> str:
    """Return the tag that a text ends on, with the white space behind it; empty for none."""
    found = _OPENED_LAST.search(text)
    return found[0] if found else ""


def from_first_tag(text: str) -> str:
    """Return a text from its first opening tag on; empty for none."""
    found = _TAG.search(text)
    return text[found.start() :] if found else ""


def _common_prefix(one: str, other: str) -> str:
    """Return what two texts begin with."""
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return one[: sum(1 for _ in same)]


def _end_before(pattern: re.Pattern[str], text: str) -> int:
    """Return where the pattern first occurs; the text's end if it does not."""
    found = pattern.search(text)
    return found.start() if found else len(text)


def _check_arguments(template: str, arguments: Mapping[str, Any]) -> None:
    """Check that the template reads all arguments: a misspelt one would do nothing."""
    words = set(re.findall(r"\w+", template))
    for name in arguments:
        if template and name not in words:
            close = difflib.get_close_matches(name, words, n=3)
            hint = f"; did you mean {', '.join(close)}?" if close else ""
            raise UserError(f"config.task.chat_template_kwargs: the chat template reads no {name!r}{hint}")
