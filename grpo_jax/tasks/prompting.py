"""A question as the model reads it: system prompt, worked examples and prompt, through the chat template or as text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from grpo_jax.config import TaskConfig
from grpo_jax.tasks import Tokenizer
from grpo_jax.tasks.questions import Message, Question


class Prompting:
    """Turns a question into token ids. shots: worked examples, shown before every question.

    A system message of the question's own goes before `task.system_prompt`. Without a chat template (or
    `task.use_chat_template` off) the messages' texts follow each other, a blank line between them, and a worked answer
    is on the line below its question.
    """

    def __init__(self, config: TaskConfig, tokenizer: Tokenizer, shots: Sequence[Question]) -> None:
        self._tokenizer, self._system_prompt = tokenizer, config.system_prompt
        self._chat: Callable[[Sequence[Message]], list[int]] | None = None
        if config.use_chat_template:
            self._chat = getattr(tokenizer, "chat", None)  # the character tokenizer has none
        self._shots: list[Message] = []
        # A chat template takes one system message, the first; that of the question, or the config's, is the one.
        for shot in shots:
            self._shots += [message for message in shot.messages if message["role"] != "system"]
            self._shots.append({"role": "assistant", "content": shot.solution})

    def __call__(self, question: Question) -> list[int]:
        """Return the ids of the prompt, up to where the answer begins."""
        first, rest = [], list(question.messages)
        if rest[0]["role"] == "system":
            first = [rest.pop(0)]
        elif self._system_prompt:
            first = [{"role": "system", "content": self._system_prompt}]
        messages = [*first, *self._shots, *rest]
        if self._chat:
            return self._chat(messages)
        return self._tokenizer.encode(self._join(messages))

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
