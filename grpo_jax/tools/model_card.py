"""The model card of an exported folder: what it was trained from, how, and what it reached."""

from __future__ import annotations

import pathlib
import re
from typing import TYPE_CHECKING, Any

from grpo_jax.errors import UserError
from grpo_jax.files import read_json, write_atomically

if TYPE_CHECKING:
    from grpo_jax.config import Config

CACHED = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/")  # a folder of the hub's cache


def hub_id_of(path: str) -> str:
    """Return the hub id that a folder of the hub's cache holds; any other path or id as it is."""
    # A path of this machine would mean nothing to those who load the adapters elsewhere.
    found = CACHED.search(path.replace("\\", "/"))
    return f"{found[1]}/{found[2]}" if found else path


def write_card(folder: pathlib.Path, config: Config, workdir: pathlib.Path, step: int, *, is_adapter: bool) -> None:
    """Write README.md into an exported folder.

    Args:
      folder: that was written. config: of the run. workdir: of the run. step: of the checkpoint.
      is_adapter: the folder holds adapters alone.
    """
    summary: dict[str, Any] = {}
    if (workdir / "summary.json").exists():
        summary = read_json(workdir / "summary.json")
    write_atomically(folder / "README.md", card(config, summary, step, is_adapter=is_adapter))


def card(config: Config, summary: dict[str, Any], step: int, *, is_adapter: bool) -> str:
    """Return the card's text: YAML that the hub reads, then words.

    Args:
      config: of the run. summary: of summary.json, empty if there is none. step: of the checkpoint.
      is_adapter: the folder holds adapters alone.
    """
    from grpo_jax import objectives

    base, method = hub_id_of(config.model.path), objectives.describe(config.objective)
    name = base or "A small decoder"
    library = "peft" if is_adapter else "transformers"
    rollout = config.rollout
    rows = [
        ("steps", f"{step} of {config.num_steps}"),
        ("task", config.task.name),
        ("reward", config.reward.task or "the task's own"),
        ("prompts x completions a step", f"{rollout.num_prompts} x {rollout.group_size}"),
        ("completion budget", f"{rollout.max_completion_tokens} tokens"),
        ("learning rate", f"{config.optimizer.learning_rate:g}"),
        ("LoRA rank", str(config.lora.rank or "none, all weights")),
        ("seed", str(config.seed)),
    ]
    # A summary is of the run's end; of an earlier checkpoint it says nothing.
    if summary.get("steps") == step:
        for when in ("before", "after"):
            value = summary.get(f"success_{when}")
            rows.append((f"held-out greedy success {when}", "unknown" if value is None else f"{value:.3f}"))
    version = summary.get("commit") or summary.get("version", "")
    lines = ["---", *([f"base_model: {base}"] if base else []), f"library_name: {library}"]
    lines += ["tags: [grpo_jax, reinforcement-learning]", "---", ""]
    lines += [
        f"# {name} trained with {method}",
        "",
        f"Trained with grpo_jax {version}".rstrip() + ".",
        "",
        "| | |",
        "|---|---|",
    ]
    return "\n".join([*lines, *(f"| {name} | {value} |" for name, value in rows)]) + "\n"


def push_to_hub(folder: pathlib.Path, repo: str) -> str:
    """Upload an exported folder; -> its address. repo: "user/name", made if it is not there. Raises UserError."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        api.create_repo(repo, exist_ok=True)
        return str(api.upload_folder(folder_path=str(folder), repo_id=repo, commit_message="Export of a grpo_jax run"))
    except (HfHubHTTPError, OSError, ValueError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"--push_to_hub={repo}: {first}; {folder} is written (log in with `hf auth login`)") from error
