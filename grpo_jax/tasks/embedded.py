"""The embedded tasks by the name in config.task.name."""

from __future__ import annotations

from grpo_jax.config import Config
from grpo_jax.config.embedded import EMBEDDED
from grpo_jax.tasks import Tokenizer
from grpo_jax.tasks.arithmetic import ALPHABET, ArithmeticTask
from grpo_jax.tasks.chain import ChainTask
from grpo_jax.tasks.countdown import CountdownTask
from grpo_jax.tasks.forks import ForksTask
from grpo_jax.tasks.maze import MazeTask
from grpo_jax.tasks.table import TableTask
from grpo_jax.tasks.tokenizers import CharTokenizer

# All but sums, which a language model's tokenizer can write too.
TABLE_TASKS: dict[str, type[TableTask]] = {each.name: each for each in (ChainTask, CountdownTask, MazeTask, ForksTask)}
assert set(TABLE_TASKS) | {"arithmetic"} == set(EMBEDDED)


def tokenizer_of(config: Config) -> CharTokenizer:
    """Make the built-in tokenizer of a config's task."""
    task = TABLE_TASKS.get(config.task.name)
    return CharTokenizer(task.alphabet if task else ALPHABET)


def make_embedded(config: Config, tokenizer: Tokenizer) -> ArithmeticTask | TableTask:
    """Make the embedded task that config.task names.

    Args:
      config: task, seed, held-out number and budget are read. tokenizer: of sums; the others have their own.
    Raises: UserError as their constructors do.
    """
    name = config.task.name
    sizes = {
        "seed": config.seed,
        "num_eval": config.eval.num_prompts,
        "max_answer_tokens": config.rollout.max_completion_tokens,
    }
    if name == "arithmetic":
        return ArithmeticTask(config.task.arithmetic, tokenizer, **sizes)
    return TABLE_TASKS[name](getattr(config.task, name), **sizes)
