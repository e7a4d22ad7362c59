"""Questions from data files: JSON Lines, and the others of `files`."""

from __future__ import annotations

from grpo_jax.config import TaskConfig
from grpo_jax.tasks.files import read_rows
from grpo_jax.tasks.questions import Source, source_of
from grpo_jax.tasks.row_rewards import RowRewards


def load(config: TaskConfig, num_eval: int, rewards: RowRewards) -> list[Source]:
    """Load the questions of `task.jsonl.path`, and those of `eval_path` if there is one.

    Args:
      config: config.task. num_eval: questions to hold out. rewards: what each row is scored by.
    Returns: one source.
    Raises: UserError naming file and line of what cannot be read.
    """
    return [load_files(config, config.jsonl.path, config.jsonl.eval_path, num_eval, "config.task.jsonl", rewards)]


def load_files(config: TaskConfig, path: str, eval_path: str, num_eval: int, field: str, rewards: RowRewards) -> Source:
    """Make a source of data files.

    Args:
      config: config.task. path, eval_path: as in `files.find_files`; eval_path may be empty.
      num_eval: questions to hold out. field: the group of config fields, for the errors. rewards: what each row is scored by.
    Returns: the source, of one stream.
    """
    rows, eval_rows = read_rows(path, f"{field}.path"), None
    if eval_path:
        eval_rows = read_rows(eval_path, f"{field}.eval_path")
    return source_of(rows, eval_rows, config.columns, rewards, num_eval, path)
