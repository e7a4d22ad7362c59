"""Views for the notebooks in colab/: a model's answers before and after training, and a run's page inside the notebook."""

from __future__ import annotations

import dataclasses
import html
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np

from grpo_jax.rng import key_for
from grpo_jax.rollout.rollout import greedy
from grpo_jax.tools.report.page import data_url
from grpo_jax.training.evaluate import compiled_rollout
from grpo_jax.training.run import Run
from grpo_jax.training.samplers import end_tokens, make_sampler_weights
from grpo_jax.types import Params

if TYPE_CHECKING:
    from IPython.display import HTML

TABLE = "<table>{}</table>"
CELL = 'style="text-align: left; vertical-align: top; white-space: pre-wrap"'


@dataclasses.dataclass(frozen=True)
class Answer:
    """Held-out question with the model's answer to it. reward: the task's, without shaping."""

    prompt: str
    completion: str
    reward: float


def greedy_answers(run: Run, policy: Params) -> list[Answer]:
    """Answer the first eval.batch_size held-out questions."""
    # As many as evaluation takes at a time, with its spec and its jitted rollout: the program is compiled already, where other
    # shapes would cost a notebook's reader a second compilation.
    prompts = jax.tree.map(lambda x: x[: run.config.eval.batch_size], jax.device_get(run.task.eval_prompts()))
    rollout = compiled_rollout(run.model, greedy(run.config.rollout), end_tokens(run.task), run.mesh)
    weights = jax.jit(make_sampler_weights(run.config, run.mesh))(policy)
    rolled = rollout(weights, prompts, key_for(run.config.seed, "evaluate"))
    tokens_PT, mask_PT = np.asarray(rolled.tokens_PGT)[:, 0], np.asarray(rolled.mask_PGT)[:, 0]
    reward_P = np.asarray(run.task.reward(prompts.answer, tokens_PT[:, None], mask_PT[:, None]).task_PG)[:, 0]

    def decode(decode_one: Callable[[np.ndarray], str], ids: np.ndarray, mask: np.ndarray) -> list[str]:
        return [decode_one(row[kept]) for row, kept in zip(ids, mask > 0, strict=True)]

    tokenizer = run.task.tokenizer
    asked = decode(tokenizer.decode_prompt, prompts.tokens_PS, prompts.mask_PS)
    pairs = zip(asked, decode(tokenizer.decode, tokens_PT, mask_PT), reward_P, strict=True)
    return [Answer(prompt, completion, float(reward)) for prompt, completion, reward in pairs]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Answers to the same questions before and after training; a notebook shows them side by side."""

    before: Sequence[Answer]
    after: Sequence[Answer]

    def _repr_html_(self) -> str:
        head = "".join(f"<th {CELL}>{title}</th>" for title in ("question", "before", "reward", "after", "reward"))
        rows = [
            (old.prompt, old.completion, f"{old.reward:.2f}", new.completion, f"{new.reward:.2f}")
            for old, new in zip(self.before, self.after, strict=True)
        ]
        body = ["".join(f"<td {CELL}>{html.escape(text)}</td>" for text in row) for row in rows]
        return TABLE.format("".join(f"<tr>{row}</tr>" for row in (head, *body)))


def with_pictures(said: str, pictures: Sequence[pathlib.Path]) -> str:
    """Write a line and the pictures that are there as HTML, with the pictures inside."""
    shown = [f'<img src="{data_url(each.read_bytes())}" style="max-width: 100%">' for each in pictures if each.exists()]
    return f"<p>{html.escape(said)}</p>" + "".join(shown)


def report_html(sentences: Sequence[str], table: str, pictures: Mapping[str, bytes]) -> str:
    """Write a report's verdict, its main table (Markdown) and its pictures (PNG) as HTML."""
    from markdown_it import MarkdownIt

    text = "\n".join(f"- {sentence}" for sentence in sentences) + f"\n\n{table}\n"
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    return body + "".join(f'<img src="{data_url(each)}" style="max-width: 100%">' for each in pictures.values())


def framed(page: pathlib.Path, height: int = 800) -> HTML:
    """Show an HTML file as a frame. height: pixels."""
    from IPython.display import HTML

    # The frame carries the page itself: a notebook opened elsewhere, or kept after its machine is gone, has no file to load.
    inside = html.escape(page.read_text(encoding="utf-8"))
    return HTML(f'<div><iframe srcdoc="{inside}" width="100%" height="{height}" style="border: 0"></iframe></div>')
