"""Questions from data files: JSON Lines, and the others of `files`."""

from __future__ import annotations

from grpo_jax.config import ColumnsConfig, TaskConfig
from grpo_jax.tasks.files import read_rows
from grpo_jax.tasks.questions import HELD_OUT, TRAINING, Question, Source, questions_of


def load(config: TaskConfig, num_eval: int, *, needs_answer: bool = True) -> list[Source]:
    """Load the questions of `task.jsonl.path`, and those of `eval_path` if there is one.

    Args:
      config: config.task. num_eval: questions to hold out. needs_answer: as in `question_of`.
    Returns: one source.
    Raises: UserError naming file and line of what cannot be read.
    """
    return [load_files(config, config.jsonl.path, config.jsonl.eval_path, num_eval, "config.task.jsonl", needs_answer)]


def load_files(config: TaskConfig, path: str, eval_path: str, num_eval: int, field: str, needs_answer: bool) -> Source:
    """Make a source of data files.

    Args:
      config: config.task. path, eval_path: as in `files.find_files`; eval_path may be empty.
      num_eval: questions to hold out. field: the group of config fields, for the errors. needs_answer: as in `question_of`.
    Returns: the source, of one stream.
    """
    train, dropped = questions_of(read_rows(path, f"{field}.path"), config.columns, needs_answer=needs_answer)
    evaluation, dropped_held_out = None, {}
    if eval_path:
        rows = read_rows(eval_path, f"{field}.eval_path")
        evaluation, dropped_held_out = questions_of(rows, config.columns, needs_answer=needs_answer)
    return Source(train, evaluation, num_eval, {"": 1.0}, path, {TRAINING: dropped, HELD_OUT: dropped_held_out})


def read_questions(path: str, field: str, columns: ColumnsConfig) -> list[Question]:
    """Read data files.

    Args:
      path: as in `files.find_files`. field: the config field that `path` came from, for the errors.
      columns: names of the columns.
    Returns: a Question for each row that has an answer.
    Raises: UserError with path and line number for what is not such a file.
    """
    return questions_of(read_rows(path, field), columns)[0]
