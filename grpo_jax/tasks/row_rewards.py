"""The reward that each row of data is scored by: config.reward.task, or what a column of the row says."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Mapping
from typing import Any

from grpo_jax.config import RewardConfig, reward_expression
from grpo_jax.errors import UserError
from grpo_jax.tasks.columns import ABSENT, column_names, find_column

# Parts that compare a completion with the row's answer. A function of one's own may do without.
COMPARING = ("math_verify", "exact", "choice", "reasoning_gym")
OTHERS = "*"  # the key of config.reward.by_column for rows that no other key is for


@dataclasses.dataclass(frozen=True)
class RowRewards:
    """Chooses a reward expression for each row.

    config: config.reward. task_name: the task whose own reward an empty config.reward.task means. column: the one that
    chooses; empty: config.reward.task for every row.
    """

    config: RewardConfig
    task_name: str
    column: str = ""

    def of(self, row: Mapping[str, Any], where: str) -> str:
        """Return the expression that a row is scored by, as in config.reward.task.

        Args:
          row: of data. where: its place, for the message.
        Raises: UserError naming place, column and value, if that means no reward.
        """
        if not self.column:
            return self.config.task or reward_expression.of_task(self.task_name)
        value = find_column(row, self.column)
        column = f"{where}: `{self.column}` (config.task.columns.reward)"
        if value is ABSENT:
            raise UserError(f"{column} is no column of it; it has {', '.join(column_names(row)) or 'none'}")
        if not self.by_value:
            return self._written(value, column)
        key = value if isinstance(value, str) else json.dumps(value, default=repr)
        expression = self.by_value.get(key, self.by_value.get(OTHERS))
        if expression is None:
            known = ", ".join(map(repr, self.by_value))
            raise UserError(
                f"{column} is {key!r:.80}: config.reward.by_column has {known}; add it, or {OTHERS!r} for all others"
            )
        return expression

    def needs_answer(self, expression: str) -> bool:
        """Tell if a part of an expression compares a completion with an answer that the row has to give."""
        # Asked at every row, and there are few expressions.
        if expression not in self._needs:
            self._needs[expression] = bool(self.comparing_parts(expression) - {"reasoning_gym"})
        return self._needs[expression]

    @functools.cached_property
    def _needs(self) -> dict[str, bool]:
        return {}

    @functools.cached_property
    def by_value(self) -> dict[str, str]:
        """Value of the column -> expression; empty: the column holds expressions."""
        return json.loads(self.config.by_column or "{}")

    def comparing_parts(self, expression: str) -> set[str]:
        """List the parts of an expression, and of config.reward.shaping, that compare a completion with the right answer."""
        texts = (expression, self.config.shaping)
        parts = {part.name for text in texts for part in reward_expression.parse(text, "config.reward")}
        found = parts & set(COMPARING)
        if "regex" in parts and re.compile(self.config.regex.pattern).groups:
            found.add("regex")
        return found

    def _written(self, value: Any, column: str) -> str:
        """Check an expression that stands in the data. Raises UserError."""
        if not isinstance(value, str) or not value.strip():
            raise UserError(f"{column} is {value!r:.80}: expected the parts of a reward, as in config.reward.task")
        # A file of data may come from anywhere: what it names must not be imported and called.
        own = next((part.name for part in reward_expression.parse(value, column) if ":" in part.name), None)
        if own:
            raise UserError(f"{column} names the function {own!r}; data may not: name it in config.reward.by_column")
        return value
