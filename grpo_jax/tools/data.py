"""The data as a model and its reward see it, to be looked at before a run:

    grpo-jax data --config=grpo:llm --config.model.path=folder --config.task.jsonl.path=train.jsonl

The first prompts, as text and as tokens; how many questions there are, and why others were left out; lengths; and what each
part of the reward says to the reference answers, which must earn 1, and to an empty completion, which must not.
"""

from __future__ import annotations

from absl import flags

from grpo_jax.tools import cli

NUM_PROMPTS = flags.DEFINE_integer("num_prompts", 3, "prompts that are shown", lower_bound=0)
NUM_SCORED = flags.DEFINE_integer("num_scored", 64, "questions whose reference answer is scored", lower_bound=0)


def main() -> None:
    """Run the command: load the data, show the page."""
    from rich.console import Console

    from grpo_jax.tools.inspection import inspect_data

    Console().print(inspect_data(cli.config_from_flags(), NUM_PROMPTS.value, NUM_SCORED.value))


def command() -> None:
    """Run from the command line."""
    cli.run(main)
