"""The reward that config.reward describes: each part is scored apart, then they are summed by weight."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import logging
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from grpo_jax.config import CodeConfig, RewardConfig, reward_expression
from grpo_jax.errors import RunError, UserError
from grpo_jax.metrics import Mean
from grpo_jax.rewards.parts import settings_of
from grpo_jax.rewards.pool.jobs import ERROR, NOT_ASKED, SCORED, TIMEOUT, Context, ScoreResult
from grpo_jax.rewards.pool.pool import Scorer, ScoringPool
from grpo_jax.rewards.pool.protocol import one_line, printable
from grpo_jax.rewards.scorers import FUNCTIONS, GROUP_FUNCTIONS
from grpo_jax.rewards.scorers.code import check_sandbox
from grpo_jax.types import Reward

BROUGHT = "brought"  # module of functions given in Python: brought_<mark of the workdir>, see training/brought.py
PACKAGES = {"math_verify": "math_verify", "reasoning_gym": "reasoning_gym"}  # part -> what it imports, of the extra `tasks`

_log = logging.getLogger(__name__)


class RewardFunction:
    """The parts of both expressions of config.reward and the worker processes that score them.

    A completion without a score for one of its parts is not scored, if that part failed or came late. If the part returned
    None, it has no opinion: it alone is left out of the sum, the weights of the others stay, and a completion about which no
    part of config.reward.task has one is not scored either.

    lines: how each function of a user's own is called. errors_folder: where each part's first traceback goes, if set.
    """

    def __init__(
        self,
        config: RewardConfig,
        task_name: str,
        max_completion_tokens: int,
        columns: Collection[str] | None = None,
        expressions: Collection[str] = (),
    ) -> None:
        """Load what is to be scored by.

        Args:
          config: config.reward. task_name: the task whose own reward an empty config.reward.task means.
          max_completion_tokens: the budget that `length` is a share of.
          columns: names of the data's columns; None: not known, so that any parameter may be one.
          expressions: those that rows are scored by; empty: config.reward.task for all of them.
        Raises: UserError if a part's library is missing, or a user's function cannot be imported or called.
        """
        self.errors_folder: Path | None = None
        self.lines: list[str] = []
        self._is_first_batch = True
        self._kept: set[str] = set()  # parts whose traceback is on disk
        self._default = config.task or reward_expression.of_task(task_name)
        used = dict.fromkeys(expressions or (self._default,))
        self._tasks = {text: dict(reward_expression.parse(text, "config.reward.task")) for text in used}
        self._shaping = dict(reward_expression.parse(config.shaping, "config.reward.shaping"))
        self._max_completion_tokens = max_completion_tokens
        settings = settings_of(config)
        # A part that both expressions name is scored once.
        self._names = tuple(dict.fromkeys(itertools.chain(*self._tasks.values(), self._shaping)))
        scorers = {}
        for name in self._names:
            if name == "code":
                _check_sandbox(config.code)
            if name in PACKAGES and importlib.util.find_spec(PACKAGES[name]) is None:
                raise UserError(f"config.reward: the part {name!r} needs a library: pip install 'grpo_jax[tasks]'")
            if name != "length":
                own = dict(config.params) if ":" in name else {}
                function = GROUP_FUNCTIONS.get(name, FUNCTIONS.get(name, name))
                scorers[name] = Scorer(function, settings.get(name, own))
        self._pool = ScoringPool(scorers, config.scoring, columns)
        # A mistake in the user's file, or a parameter that nothing can be given to, should show before a model is loaded.
        if any(":" in name for name in self._names):
            self._pool.start()
        self._check_params(config)
        self.lines = [each.line for name, each in self._pool.facts.items() if ":" in name]
        for line in self.lines:
            _log.info(one_line(line))

    @property
    def wants_ids(self) -> bool:
        """True if a function asks for the tokens of completions."""
        return any(each.wants_ids for each in self._pool.facts.values())

    def __call__(
        self,
        items: Sequence[Mapping[str, Any]],
        completions_PG: Sequence[Sequence[str]],
        lengths_PG: Int[np.ndarray, "P G"],
        context: Context | None = None,
        expressions_P: Sequence[str] | None = None,
    ) -> Reward:
        """Score the completions of each item.

        Args:
          items: P rows of data. completions_PG: G texts of each.
          lengths_PG: tokens, stop token included. context: what functions may ask for beside the item.
          expressions_P: what each item is scored by, of those that were given at first; None: config.reward.task.
        Returns: a Reward of float32 arrays [P, G]; what has no score counts 0 in their sums.
        Raises: RunError if all completions of the first batch fail in the same part.
        """
        task_P = [self._tasks[text] for text in expressions_P or [self._default] * len(items)]
        weights = {name: np.asarray([parts.get(name, 0.0) for parts in task_P], np.float32) for name in self._names}
        # Which rows a part is asked about: all, where there is one expression for all of them, or where shaping names it.
        in_task = {name: np.asarray([name in parts for parts in task_P], bool) for name in self._names}
        is_asked = {name: each_P | (name in self._shaping) for name, each_P in in_task.items()}
        scored = self._pool.score(items, completions_PG, context, is_asked)
        self._report(scored)
        shape = np.shape(lengths_PG)  # (0, G) on a host that has no rows of its own
        scores = {name: each.reshape(shape) for name, each in scored.scores.items()}
        outcomes = {name: each.reshape(shape) for name, each in scored.outcomes.items()}
        if "length" in self._names:
            # Counted here and not in a worker: the number of tokens is known, while a text tells it only to its tokenizer.
            is_asked_PG = np.broadcast_to(is_asked["length"][:, None], shape)
            scores["length"] = np.where(is_asked_PG, 1 - np.asarray(lengths_PG, np.float32) / self._max_completion_tokens, 0)
            outcomes["length"] = np.where(is_asked_PG, SCORED, NOT_ASKED)
        # Sums and counts, no means: on several hosts each has scored its own rows only.
        metrics = {
            "reward/errors": _mean(scored.is_error_PG),
            "reward/timeouts": _mean(scored.is_timeout_PG),
            "reward/abstained": _mean(scored.is_abstained_PG),
            **{f"reward/part/{_label(name)}": _mean(scores[name], outcomes[name] == SCORED) for name in self._names},
        }
        task_PG, shaping_PG = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        is_failed_PG, is_task_failed_PG, has_opinion_PG = (np.zeros(shape, bool) for _ in range(3))
        # In float32, the dtype that the update computes with.
        for name in self._names:
            in_task_P1, has_failed_PG = in_task[name][:, None], np.isin(outcomes[name], (ERROR, TIMEOUT))
            task_PG += weights[name][:, None] * scores[name]
            is_failed_PG |= has_failed_PG
            is_task_failed_PG |= has_failed_PG & in_task_P1
            has_opinion_PG |= (outcomes[name] == SCORED) & in_task_P1
        for name, weight in self._shaping.items():
            shaping_PG += np.float32(weight) * scores[name]
        return Reward(
            task_PG,
            shaping_PG,
            metrics,
            is_scored_PG=has_opinion_PG & ~is_failed_PG,
            has_task_score_PG=has_opinion_PG & ~is_task_failed_PG,
        )

    def close(self) -> None:
        """End the scoring processes."""
        self._pool.close()

    def _check_params(self, config: RewardConfig) -> None:
        """Check that some function takes each setting. Raises UserError naming the one that none does."""
        taken = {name for each in self._pool.facts.values() for name in each.settings}
        unknown = sorted(set(config.params) - taken)
        if unknown:
            self.close()
            functions = ", ".join(name for name in self._names if ":" in name) or "there is none of your own"
            raise UserError(f"config.reward.params.{unknown[0]}: no reward function has such a parameter ({functions})")

    def _report(self, scored: ScoreResult) -> None:
        """Keep the first traceback of each part. Raises RunError if the first batch shows that a part cannot work."""
        for name, failure in scored.failures.items():
            self._keep_traceback(name, failure)
        if not self._is_first_batch or not all(scored.shape):
            return
        self._is_first_batch = False
        for name, outcomes_PG in scored.outcomes.items():
            asked = outcomes_PG[outcomes_PG != NOT_ASKED]
            if not len(asked):
                continue
            every = f"reward {name}: all {len(asked)} completions of the first batch"
            if (asked == TIMEOUT).all():
                raise RunError(f"{every} came late; raise config.reward.scoring.time_limit_secs, or make it faster")
            if np.isin(asked, (ERROR, TIMEOUT)).all():
                line = one_line(scored.failures[name].partition("\n")[0])
                if self.errors_folder is not None:
                    line += f"; traceback in {self._traceback_file(name)}"
                raise RunError(f"{every} failed: {line}")
            if not (asked == SCORED).any():
                _log.warning("reward %s: none of the %d completions of the first batch has a score", name, len(asked))

    def _keep_traceback(self, name: str, failure: str) -> None:
        """Write a part's first error of this process to its file."""
        if self.errors_folder is None or name in self._kept:
            return
        self._kept.add(name)
        # Line by line, for a terminal shows what is in the file: no text from a reward may steer it.
        line, _, more = failure.partition("\n")
        text = "\n".join(map(printable, (more or line).split("\n")))
        try:
            self.errors_folder.mkdir(parents=True, exist_ok=True)
            self._traceback_file(name).write_text(text.rstrip() + "\n", encoding="utf-8")
        except OSError as error:
            _log.warning("%s: cannot be written (%s)", self._traceback_file(name), error.strerror)

    def _traceback_file(self, name: str) -> Path:
        assert self.errors_folder is not None
        return self.errors_folder / f"{re.sub(r'[^0-9A-Za-z_.-]', '_', name)}.txt"


def _check_sandbox(config: CodeConfig) -> None:
    """Run an empty program. Raises UserError if this machine cannot run one as config.reward.code wants it."""
    try:
        check_sandbox(**dataclasses.asdict(config))
    except (RuntimeError, OSError) as error:
        raise UserError(f"config.reward: the part 'code': {error}") from None


def _label(name: str) -> str:
    """Return what a part is called in the records: the same for a function brought to any workdir, so that runs compare."""
    module, colon, function = name.partition(":")
    return f"{BROUGHT}:{function}" if colon and module.startswith(f"{BROUGHT}_") else name


def _mean(values_PG: np.ndarray, counted_PG: np.ndarray | None = None) -> Mean:
    """Average values; counted_PG: those that count, the others being 0; None: all."""
    count = values_PG.size if counted_PG is None else counted_PG.sum()
    return Mean(np.float32(values_PG.sum()), np.float32(count))
