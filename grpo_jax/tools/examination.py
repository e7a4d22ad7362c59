"""Checks of all that a run would read, before it reads it: what `grpo-jax doctor` shows."""

from __future__ import annotations

import dataclasses
import pathlib
import shutil
from collections.abc import Callable, Iterator

from grpo_jax.config import Config, parse_config
from grpo_jax.errors import UserError
from grpo_jax.files import read_json
from grpo_jax.models.families import read_architecture
from grpo_jax.models.folders import resolve
from grpo_jax.models.hf import check_weights
from grpo_jax.tasks.tokenizers import HFTokenizer
from grpo_jax.tools import cli
from grpo_jax.training import build
from grpo_jax.training.checkpoint import numbered_folders
from grpo_jax.training.checksums import find_damage
from grpo_jax.training.disk import in_units, size_of_checkpoint
from grpo_jax.training.lock import NAME as LOCK
from grpo_jax.training.lock import parse_owner, read_bytes
from grpo_jax.training.records import SHOWN_LINES, Check, scan
from grpo_jax.training.run import make_run
from grpo_jax.training.runlog import completion_fault, metrics_fault
from grpo_jax.training.settings import read_config


@dataclasses.dataclass(frozen=True)
class Finding:
    """A part that was looked at. kind: ok, note or wrong. said: what was found, and of what is wrong what to do."""

    kind: str
    part: str
    said: str


Findings = Iterator[Finding]


def examine(what: str) -> Findings:
    """Look at a run's folder, a model or a config, and yield what is found in each part."""
    folder = pathlib.Path(what)
    if folder.is_dir() and is_run(folder):
        yield from examine_run(folder)
    elif is_config(what):
        yield from examine_config(what)
    else:
        yield from examine_model(what)


def is_config(what: str) -> bool:
    """Tell if this names a config: a file, or a shipped one."""
    try:
        return ".py" in what or bool(cli.find_config(what, "doctor"))
    except UserError:
        return False


def is_run(folder: pathlib.Path) -> bool:
    """Tell if a folder is a run's and not a model's: both have a config.json."""
    return any((folder / name).exists() for name in ("metrics.jsonl", "checkpoints", "sources.json", "summary.json"))


def attempt(part: str, check: Callable[[], str]) -> Finding:
    """Make a check that returns what it found or raises UserError."""
    try:
        return Finding("ok", part, check())
    except UserError as error:
        return Finding("wrong", part, str(error))
    except Exception as error:  # a doctor who falls ill helps nobody: this part is not looked at further
        return Finding("wrong", part, f"{type(error).__name__}: {error}")


def examine_run(workdir: pathlib.Path) -> Findings:
    """Look at the folder of a run, then at what its config reads."""
    yield examine_lock(workdir)
    configs: list[Config] = []

    def read() -> str:
        configs.append(read_config(workdir))
        read_json(workdir / "config.json", "it is taken from a checkpoint; the next start writes it anew")
        return "can be read"

    yield attempt("config.json", read)
    yield examine_records(workdir / "metrics.jsonl", metrics_fault)
    yield examine_records(workdir / "completions.jsonl", completion_fault)
    yield from examine_checkpoints(workdir)
    if (workdir / "summary.json").exists():
        yield attempt(
            "summary.json", lambda: f"{read_json(workdir / 'summary.json', 'the next start writes it anew')['steps']} steps"
        )
    if configs:
        yield attempt("sources.json", lambda: examine_sources(workdir, configs[0]))
        yield from examine_parts(configs[0], workdir)


def examine_lock(workdir: pathlib.Path) -> Finding:
    """See who has the folder."""
    text = read_bytes(workdir / LOCK)
    if text is None:
        return Finding("ok", LOCK, "nobody is at work in this folder")
    owner = parse_owner(text)
    if owner.is_here and not owner.is_alive:
        return Finding("note", LOCK, f"{owner} is gone without having removed it; the next start does")
    return Finding("note", LOCK, f"{owner} is at work in this folder, as far as can be told from here")


def examine_records(path: pathlib.Path, check: Check) -> Finding:
    """Read a file of records; say what is damaged, and which steps are missing or there twice."""
    if not path.exists():
        return Finding("note", path.name, "not there; a run writes it from its first step on")
    steps, faults = [], []
    for record, fault in scan(path, check):
        if record is not None:
            steps.append(record["step"])
        else:
            faults.append(fault)
    if faults:
        more = f" and {len(faults) - SHOWN_LINES} more" if len(faults) > SHOWN_LINES else ""
        said = f"no record: {', '.join(faults[:SHOWN_LINES])}{more}; readers skip them, delete the lines to be rid of this"
        return Finding("wrong", path.name, said)
    if path.name == "metrics.jsonl" and steps != list(range(len(steps))):
        missing = sorted(set(range(max(steps, default=0) + 1)) - set(steps))
        said = (
            f"steps are missing ({len(missing)}, the first {missing[0]})"
            if missing
            else "steps are there twice or out of order"
        )
        return Finding("wrong", path.name, f"{said}; they cannot be had back, and curves and sums of seconds lack them")
    return Finding("ok", path.name, f"{len(steps)} records, the last of step {max(steps, default=0)}")


def examine_checkpoints(workdir: pathlib.Path) -> Findings:
    """Compare all checkpoints with their checksums."""
    folder, steps = workdir / "checkpoints", numbered_folders(workdir)
    if not steps:
        yield Finding("note", "checkpoints", "none; a start begins at step 0")
    for step in reversed(steps):
        part = f"checkpoints/{step}"
        damage = "no checkpoint is in it" if not (folder / str(step) / "state").is_dir() else find_damage(folder / str(step))
        if damage:
            yield Finding("wrong", part, f"{damage}; a start goes on from an older one, --step=N from the one you name")
        elif damage is None:
            yield Finding("note", part, "has no checksums, an older version wrote it")
        else:
            yield Finding("ok", part, "is what was written")
    for path in sorted(folder.glob("aside-*")):
        yield Finding(
            "note", f"checkpoints/{path.name}", "was damaged, or stood in the way of a step; delete it if you do not need it"
        )


def examine_sources(workdir: pathlib.Path, config: Config) -> str:
    """Compare the files of the model with those that the run began with. Raises UserError if they are others."""
    sources = build.sources_of(config)
    if not (workdir / "sources.json").exists():
        return "not there; files of the model are not compared"
    before = read_json(workdir / "sources.json", "files of the model are not compared")
    changed = [name for name, mark in sources.items() if before.get(name, mark) != mark]
    if changed:
        raise UserError(f"other files than the run began with: {', '.join(changed)}; bring them back, or start another run")
    return "the model's files are those that the run began with" if sources else "nothing outside of the folder is read"


def examine_config(what: str) -> Findings:
    """Look at a config and at what it reads."""
    configs: list[Config] = []

    def read() -> str:
        configs.append(parse_config(cli.load_config(what, "doctor")))
        return "all settings fit together"

    yield attempt(what, read)
    if configs:
        yield from examine_parts(configs[0], pathlib.Path.cwd())


def examine_parts(config: Config, workdir: pathlib.Path) -> Findings:
    """Look at the model, the data and the disk of a config. workdir: where the run is, or will be."""
    if config.model.path:
        yield from examine_model(config.model.path)

    def assemble() -> str:
        run = make_run(config)
        run.task.close()
        one, free = size_of_checkpoint(run.abstract_state), shutil.disk_usage(workdir).free
        needed = (max(config.checkpoint.keep, 1) + 1) * one
        keep = config.checkpoint.keep
        said = f"{in_units(free)} are free, {in_units(needed)} needed for checkpoints (config.checkpoint.keep = {keep})"
        if free < needed:
            raise UserError(f"{said}: make room, or keep fewer")
        return f"task and model go together; {said}"

    yield attempt("task, model, disk", assemble)


def examine_model(path: str) -> Findings:
    """Look at a model's folder: its config, its tokenizer, and every number of its weights."""
    yield attempt(f"{path}: config.json", lambda: f"{read_architecture(path).num_layers} layers")
    yield attempt(f"{path}: tokenizer", lambda: f"{HFTokenizer(path).vocab_size} tokens")
    yield attempt(f"{path}: weights", lambda: f"{check_weights(resolve(path), read_architecture(path)):,} numbers, all finite")
