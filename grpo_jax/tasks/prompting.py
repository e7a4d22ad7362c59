"""A question as the model reads it: system prompt, worked examples and prompt, through the chat template or as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from grpo_jax.config import TaskConfig
from grpo_jax.tasks import Tokenizer
from grpo_jax.tasks.chat import ChatTemplate, from_first_tag, opened_last
from grpo_jax.tasks.questions import Message, Question


class Prompt(NamedTuple):
    """ids: up to where the answer begins. opens: what the prompt has begun of the answer, as `<think>`; empty for most."""

    ids: list[int]
    opens: str


class Prompting:
    """Turns a question into token ids. shots: worked examples, shown before every question.

    `task.prompt_template` is around the last message of every question. A system message of the question's own goes before
    `task.system_prompt`. Without a chat template (or `task.use_chat_template` off) the messages' texts follow each other, a
    blank line between them, and a worked answer is on the line below its question; the text begins with one BOS, if the
    tokenizer writes one. `task.assistant_prefill` ends every prompt.
    """

    def __init__(self, config: TaskConfig, tokenizer: Tokenizer, shots: Sequence[Question]) -> None:
        self._tokenizer, self._system_prompt = tokenizer, config.system_prompt
        self._template, self._prefill = config.prompt_template, config.assistant_prefill
        self._chat: ChatTemplate | None = None
        if config.use_chat_template and hasattr(tokenizer, "render_chat"):  # the character tokenizer has none
            self._chat = ChatTemplate(config, tokenizer)
        self._shots: list[Message] = []
        # A chat template takes one system message, the first; that of the question, or the config's, is the one.
        for shot in shots:
            self._shots += [message for message in self._asked(shot) if message["role"] != "system"]
            self._shots.append({"role": "assistant", "content": shot.solution})

    def __call__(self, question: Question) -> Prompt:
        """Return the ids of the prompt, up to where the answer begins."""
        text = self.text(question)
        if self._chat:
            return Prompt(self._tokenizer.encode(text), self._chat.opened(text))
        return Prompt(self._tokenizer.encode_prompt(text), from_first_tag(self._prefill) or opened_last(text))

    def text(self, question: Question) -> str:
        """Return the text of the prompt, without the BOS that the tokenizer may write before a plain one."""
        first, rest = [], self._asked(question)
        if rest[0]["role"] == "system":
            first = [rest.pop(0)]
        elif self._system_prompt:
            first = [{"role": "system", "content": self._system_prompt}]
        messages = [*first, *self._shots, *rest]
        text = self._chat(messages) if self._chat else self._join(messages)
        return text + self._prefill

    def markup(self) -> tuple[str, ...]:
        """Return the marks of turns that no question should hold, since the chat template writes them; none for plain text."""
        return self._chat.markup() if self._chat else ()

    def _asked(self, question: Question) -> list[Message]:
        """Return a question's messages, the last one inside of `task.prompt_template`."""
        *before, last = question.messages
        if self._template:
            last = {**last, "content": self._template.replace("{prompt}", last["content"])}
        return [*before, last]

    def _join(self, messages: Sequence[Message]) -> str:
        """Join messages into one text."""
        text = messages[0]["content"]
        for message in messages[1:]:
            gap = "\n" if message["role"] == "assistant" else "\n\n"
            text += gap + message["content"]
        # After worked examples the answer is due on a line of its own, as theirs are. Without examples the text is the prompt
        # as it was given.
        if self._shots:
            text += "\n"
        return text
