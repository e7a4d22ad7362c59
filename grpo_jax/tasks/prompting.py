"""A question as the model reads it: system prompt, worked examples and prompt, through the chat template or as text."""

from __future__ import annotations

from collections.abc import Sequence

from grpo_jax.config import TaskConfig
from grpo_jax.tasks import Tokenizer
from grpo_jax.tasks.questions import Message, Question


class Prompting:
    """Question -> token ids. shots: worked examples, shown before every question.

    A system message of the question's own goes before `task.system_prompt`. Without a chat template (or
    `task.use_chat_template` off) the messages' texts follow each other, a blank line between them, and a worked answer
    stands on the line below its question.
    """

    def __init__(self, config: TaskConfig, tokenizer: Tokenizer, shots: Sequence[Question]) -> None:
        self._tokenizer, self._system_prompt = tokenizer, config.system_prompt
        self._chat = getattr(tokenizer, "chat", None) if config.use_chat_template else None
        self._shots: list[Message] = []
        for shot in shots:
            self._shots += [message for message in shot.messages if message["role"] != "system"]
            self._shots.append({"role": "assistant", "content": shot.solution})

    def __call__(self, question: Question) -> list[int]:
        """The ids of the prompt, up to where the answer begins."""
        first, rest = [], list(question.messages)
        if rest[0]["role"] == "system":
            first = [rest.pop(0)]
        elif self._system_prompt:
            first = [{"role": "system", "content": self._system_prompt}]
        messages = [*first, *self._shots, *rest]
        return self._chat(messages) if self._chat else self._tokenizer.encode(self._as_text(messages))

    def _as_text(self, messages: Sequence[Message]) -> str:
        text = ""
        for before, message in zip([None, *messages], messages, strict=False):
            gap = "" if before is None else "\n" if message["role"] == "assistant" else "\n\n"
            text += gap + message["content"]
        return text + "\n" if self._shots else text
