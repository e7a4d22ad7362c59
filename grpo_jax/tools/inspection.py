"""A view of the data as a model and its reward see it: the page that `grpo-jax data` shows."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
from jaxtyping import Int
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from grpo_jax.config import Config, parse_config
from grpo_jax.errors import RunError
from grpo_jax.tasks import Task, TraceableTask, data_metrics, summary
from grpo_jax.tasks.host import HostTask
from grpo_jax.tasks.row_rewards import RowRewards
from grpo_jax.training.build import make_task
from grpo_jax.training.completions import text_pieces

SHOWN_TOKENS = 400  # of a prompt; the middle of a longer one is left out
NUM_BINS, BAR_WIDTH = 8, 40  # of the histogram
TASK, PART = "config.reward.task", "reward/part/"  # the name of the whole task reward, and what the metrics call a part


@dataclasses.dataclass(frozen=True)
class PromptView:
    """One prompt. pieces: the text of each token; is_special: it is markup, not text. opens: what it begins of the answer."""

    where: str
    pieces: tuple[str, ...]
    is_special: tuple[bool, ...]
    answer: Any
    opens: str

    @property
    def text(self) -> str:
        """The prompt as the model reads it."""
        return "".join(self.pieces)


@dataclasses.dataclass(frozen=True)
class PartView:
    """Scores of one part of the reward, or of the whole task reward: means over the questions that were tried.

    reference: of the reference answers; None: the data has none, or none has a score. empty: of an empty completion; None:
    it has no score. compares: the part must give 1 to the reference, and less to an empty completion.
    wrong: places of questions whose reference earns less than 1. trivial: of those where an empty completion earns 1.
    """

    name: str
    reference: float | None
    empty: float | None
    compares: bool
    wrong: tuple[str, ...] = ()
    trivial: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        """A complaint in a few words; empty if there is none."""
        said = []
        for places, what in (
            (self.wrong, "the reference answer is not right for"),
            (self.trivial, "an empty one is right for"),
        ):
            if places:
                said.append(f"{what} {', '.join(places[:3])}" + f" and {len(places) - 3} more" * (len(places) > 3))
        return "; ".join(said)


@dataclasses.dataclass(frozen=True)
class DataView:
    """All that the page shows. counts: as in a run's records. lengths: of all prompts, tokens. limit: of a prompt.

    budget: of a completion, tokens. stops: the tokens and texts that end one. num_scored: questions whose reference was tried.
    num_over_budget: of these, those whose reference is longer than the budget.
    """

    title: str
    summary: str
    counts: Mapping[str, float]
    lengths: Int[np.ndarray, " N"]
    limit: int
    budget: int
    prompts: tuple[PromptView, ...]
    parts: tuple[PartView, ...]
    stops: tuple[str, ...]
    num_scored: int
    num_over_budget: int

    @property
    def complaints(self) -> list[str]:
        """The things to look at before a run."""
        said = [f"{part.name}: {part.verdict}" for part in self.parts if part.verdict]
        if self.num_over_budget:
            said.append(
                f"{self.num_over_budget} of {self.num_scored} reference answers are longer than "
                f"config.rollout.max_completion_tokens = {self.budget}"
            )
        return said

    def __rich__(self) -> RenderableType:
        ends = f"a completion ends with {', '.join(map(repr, self.stops))}, or after {self.budget} tokens"
        shown: list[RenderableType] = [
            Text(self.title, style="bold"),
            Text(self.summary),
            Text(ends),
            _counts_table(self.counts),
        ]
        shown += [_prompt_panel(prompt, number) for number, prompt in enumerate(self.prompts, 1)]
        shown += [_histogram(self.lengths, self.limit), _parts_table(self.parts, self.num_scored)]
        shown += [Text(f"! {complaint}", style="bold red") for complaint in self.complaints]
        return Group(*shown)


def inspect_data(config: Any, num_prompts: int = 3, num_scored: int = 64) -> DataView:
    """Look at a config's data and reward as a run would use them.

    Args:
      config: a Config, or what `parse_config` takes. num_prompts: prompts to show.
      num_scored: questions whose reference answer is scored.
    Returns: the view; `rich.print` shows it as a page.
    Raises: UserError as a run would on bad data.
    """
    if not isinstance(config, Config):
        config = parse_config(config)
    task = make_task(config)
    try:
        num_over_budget, num_tried, parts = score_references(task, config, num_scored)
        return DataView(
            title=f"{config.task.name}: {config.model.path or 'the built-in decoder'}",
            summary=summary(task),
            counts=data_metrics(task),
            lengths=lengths_of(task, config),
            limit=config.task.max_prompt_tokens,
            budget=config.rollout.max_completion_tokens,
            prompts=tuple(views_of(task, num_prompts)),
            parts=tuple(parts),
            stops=(*(token_text(task, i) for i in task.stop_ids), *config.rollout.stop),
            num_scored=num_tried,
            num_over_budget=num_over_budget,
        )
    finally:
        task.close()


def lengths_of(task: Task, config: Config) -> Int[np.ndarray, " N"]:
    """Return the lengths of all prompts, tokens; of a task that makes them by a rule, of as many as are held out."""
    if isinstance(task, HostTask):
        return task.prompt_lengths
    return np.asarray(task.train_prompts(0, config.eval.num_prompts).mask_PS).sum(-1)


def token_text(task: Task, i: int) -> str:
    """Return the text of a token; for built-in characters its number."""
    token = getattr(task.tokenizer, "token", None)
    return token(i) if token else f"token {i}"


def views_of(task: Task, num: int) -> Iterator[PromptView]:
    """Yield the first training prompts, in the order in which a run with this seed draws them."""
    if not num:
        return
    prompts = task.train_prompts(0, num)
    tokenizer = task.tokenizer
    special_ids = getattr(tokenizer, "special_ids", frozenset())
    whole: Any = types.SimpleNamespace(decode=tokenizer.decode_prompt)  # leaves nothing out of what it decodes
    for tokens_S, mask_S, answer in zip(prompts.tokens_PS, prompts.mask_PS, prompts.answer, strict=True):
        ids = np.asarray(tokens_S)[np.asarray(mask_S)].tolist()
        item, where = row_of(task, answer)
        yield PromptView(
            where,
            tuple(text_pieces(whole, ids)),
            tuple(i in special_ids for i in ids),
            item.get("answer"),
            item.get("prompt_opens", ""),
        )


def row_of(task: Task, answer: Any) -> tuple[Mapping[str, Any], str]:
    """Return (what a prompt is scored by, the place of its row). answer: of the prompt, in `Prompts.answer`."""
    if isinstance(task, HostTask):
        return task.row(int(answer))
    return {"answer": task.tokenizer.decode(cast(TraceableTask, task).reference(answer))}, "made by a rule"


def score_references(task: Task, config: Config, num: int) -> tuple[int, int, list[PartView]]:
    """Score the reference answers of the first training prompts, and an empty completion of each.

    Args:
      task: of the prompts and the reward. config: reward and budget are read. num: of prompts.
    Returns: (references longer than the budget, prompts tried, the parts' scores and those of the whole task reward).
    Raises: RunError if a part fails on all references, as on a run's first batch.
    """
    if not num:
        return 0, 0, []
    tried = Tried(task, task.train_prompts(0, num).answer, config.rollout.max_completion_tokens)
    references = {number: ids for number in range(num) if (ids := reference_ids(task, *tried.row(number))) is not None}
    right, empty = {}, {}
    if references:
        right = tried.scores(references)
    nothing: dict[int, list[int]] = {number: [] for number in range(num)}
    # A part may fail on all empty completions, int("") does: in a run that would be one outcome among others.
    with contextlib.suppress(RunError):
        empty = tried.scores(nothing)
    comparing = {TASK}
    if isinstance(task, HostTask):
        comparing = set().union(*map(RowRewards(config.reward, config.task.name).comparing_parts, task.expressions))
    parts = []
    for name in right or empty:
        compares = name in comparing
        wrong, trivial = (), ()
        if compares and (right.get(name) or 0.0) < 1:
            wrong = tried.places(references, name, lambda score: score < 1)
        if compares and (empty.get(name) or 0.0) > 0:
            trivial = tried.places(nothing, name, lambda score: score >= 1)
        parts.append(PartView(name, right.get(name), empty.get(name), compares, wrong, trivial))
    num_over_budget = sum(len(ids) >= config.rollout.max_completion_tokens for ids in references.values())
    return num_over_budget, num, parts


@dataclasses.dataclass(frozen=True)
class Tried:
    """Prompts whose reward is tried. answers: their `Prompts.answer`. budget: T of a rollout, tokens."""

    task: Task
    answers: Any
    budget: int

    def row(self, number: int) -> tuple[Mapping[str, Any], Any]:
        """Return (what a prompt is scored by, its `Prompts.answer`)."""
        answer = self.answers[number]
        return row_of(self.task, answer)[0], answer

    def scores(self, completions: Mapping[int, Sequence[int]]) -> dict[str, float | None]:
        """Score completions together.

        Args:
          completions: number of the prompt -> ids, without a stop token.
        Returns: TASK and each part -> mean score; None if none of them has one.
        """
        width = max(self.budget, *(len(ids) + 1 for ids in completions.values()))
        tokens_PGT = np.full((len(completions), 1, width), self.task.tokenizer.pad_id, np.int32)
        mask_PGT = np.zeros(tokens_PGT.shape, np.float32)
        for place, ids in enumerate(completions.values()):
            tokens_PGT[place, 0, : len(ids) + 1] = [*ids, self.task.stop_ids[0]]
            mask_PGT[place, 0, : len(ids) + 1] = 1
        reward = self.task.reward(self.answers[np.asarray(list(completions))], tokens_PGT, mask_PGT)
        found: dict[str, float | None] = {TASK: float(np.mean(np.asarray(reward.task_PG)))}
        for name, metric in reward.metrics.items():
            if name.startswith(PART):
                found[name.removeprefix(PART)] = metric.value() if metric.count else None
        return found

    def places(self, completions: Mapping[int, Sequence[int]], name: str, is_meant: Callable[[float], bool]) -> tuple[str, ...]:
        """List the places of prompts by the score of their completions.

        Args:
          completions: as in `scores`. name: of the part. is_meant: which scores; none counts as 0.
        """
        # One by one: the metrics of a reward are means of what it was given.
        scores = {number: self.scores({number: ids}).get(name) or 0.0 for number, ids in completions.items()}
        return tuple(row_of(self.task, self.answers[number])[1] for number, score in scores.items() if is_meant(score))


def reference_ids(task: Task, item: Mapping[str, Any], answer: Any) -> list[int] | None:
    """Return the reference answer as a model would write it; None if there is none. Without a stop token.

    Args:
      task: of the prompt. item: what it is scored by. answer: of the prompt.
    """
    if not isinstance(task, HostTask):
        return cast(TraceableTask, task).reference(answer)
    reference = item.get("answer")
    if isinstance(reference, tuple):
        reference = reference[0]
    if reference is None:
        return None
    # What the prompt has opened is closed first: until then everything is thought and no answer.
    return task.tokenizer.encode(closing(item.get("prompt_opens", "")) + str(reference))


def closing(opens: str) -> str:
    """Write the closing tags of a text's open ones, the last opened first."""
    open_tags: list[str] = []
    for slash, name in re.findall(r"<(/?)([A-Za-z][\w:-]*)[^<>]*>", opens):
        if not slash:
            open_tags.append(name)
        elif name in open_tags:
            open_tags.remove(name)
    return "".join(f"</{name}>\n" for name in reversed(open_tags))


def _counts_table(counts: Mapping[str, float]) -> Table:
    table = Table(box=None, show_header=False)
    for name, value in counts.items():
        table.add_row(name, f"{value:.0f}")
    return table


def _prompt_panel(prompt: PromptView, number: int) -> Panel:
    """Show a prompt: its text with the markup set off, then the same with its tokens apart."""
    pieces = list(zip(prompt.pieces, prompt.is_special, strict=True))
    if len(pieces) > SHOWN_TOKENS:
        left_out = (f" ... {len(pieces) - SHOWN_TOKENS} tokens ... ", False)
        pieces = [*pieces[: SHOWN_TOKENS // 2], left_out, *pieces[-SHOWN_TOKENS // 2 :]]
    text, tokens = Text(), Text(style="dim")
    for place, (piece, is_special) in enumerate(pieces):
        style = "bold magenta" if is_special else ""
        text.append(piece, style)
        tokens.append("\u2502" * (place > 0))
        tokens.append(piece.encode("unicode_escape").decode() if piece.isspace() else piece.replace("\n", "\\n"), style)
    said = Text(f"answer: {prompt.answer!r}", style="green")
    if prompt.opens:
        said.append(f"   the prompt begins it with {prompt.opens!r}")
    title = f"prompt {number}: {prompt.where}, {len(prompt.pieces)} tokens"
    return Panel(Group(text, Text(), tokens, Text(), said), title=escape(title), title_align="left")


def _histogram(lengths: Int[np.ndarray, " N"], limit: int) -> Table:
    """Show how many prompts have which length."""
    counts, edges = np.histogram(lengths, bins=min(NUM_BINS, int(np.ptp(lengths)) + 1))
    table = Table(title=f"tokens of {len(lengths)} prompts, at most {limit}", title_justify="left", box=None, show_header=False)
    for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True):
        bar = "\u2588" * math.ceil(BAR_WIDTH * count / counts.max())
        first, last = math.ceil(low), math.floor(high)
        table.add_row(f"{first} to {last}" if last > first else str(first), bar, str(count))
    return table


def _parts_table(parts: Sequence[PartView], num: int) -> Table:
    """Show what the reward says to right and to empty answers."""
    table = Table(title=f"rewards of {num} questions", title_justify="left", box=None)
    for name in ("part", "reference answer", "empty completion", ""):
        table.add_column(name)
    for part in parts:
        reference, empty = ("none" if score is None else f"{score:.3g}" for score in (part.reference, part.empty))
        mark = Text("compares with no answer", style="dim")
        if part.compares:
            mark = Text(part.verdict, style="bold red") if part.verdict else Text("ok", style="green")
        elif part.name == TASK:
            mark = Text("all of it, by weight", style="dim")
        table.add_row(part.name, reference, empty, mark)
    return table
