"""The run's state on disk: Orbax, written in the background, the newest few kept; killed at any moment, it resumes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from grpo_jax.config import CheckpointConfig, Config, parse_config
from grpo_jax.config.aliases import complete
from grpo_jax.errors import UserError
from grpo_jax.files import note_once, read_json, write_atomically
from grpo_jax.parallel import hosts
from grpo_jax.parallel.sharding import path_names
from grpo_jax.types import Params, TrainState

SEEN_WITHIN_SECS = 60.0  # a network's file system may show a file so late to the other hosts


class Checkpointer:
    """Saves and restores TrainState under `<workdir>/checkpoints`. A save that was cut off is never restored.

    What never changes (`base`, `ref_params`, `hyperparams`) is left out and reloaded from its source.
    """

    def __init__(self, workdir: pathlib.Path, config: CheckpointConfig):
        # keep = 0 is about finished runs (`trainer.finalize_run`): one that is under way needs a checkpoint to resume from.
        options = ocp.CheckpointManagerOptions(max_to_keep=max(config.keep, 1), create=True, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager((workdir / "checkpoints").absolute(), options=options)

    def latest_step(self) -> int | None:
        """Return the step of the newest finished checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, config: dict[str, Any]) -> None:
        """Start writing; returns before the bytes are on disk. A step already saved is left as it is.

        Args:
          step: of the state. state: its frozen parts are left out.
          config: stored as JSON beside it, so that a checkpoint says by itself of which run it is.
        """
        # The loop saves once more when it ends, maybe at a step that it has just saved.
        if self._manager.latest_step() == step:
            return
        saved = saved_fields(state)
        # The writing is asynchronous, and begins with a copy to the host. On a CPU that "copies" nothing: the files would be
        # written from the very buffers that the next call takes, since states are donated, and overwrites. So copy first.
        if jax.default_backend() == "cpu":
            saved = jax.tree.map(jnp.copy, saved)
        items = ocp.args.Composite(state=ocp.args.PyTreeSave(saved), config=ocp.args.JsonSave(config))
        self._manager.save(step, args=items)

    def restore(self, step: int, like: TrainState) -> TrainState:
        """Read the state saved at `step`, sharded like `like`. Raises UserError if it was saved from another structure."""
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), saved_fields(like))
        return dataclasses.replace(_BLANK, **_restore(self._manager, step, abstract))

    def close(self) -> None:
        """Wait for the last save and release the threads."""
        self._manager.wait_until_finished()
        self._manager.close()


def saved_steps(workdir: pathlib.Path) -> list[int]:
    """List the steps of all finished checkpoints in a workdir, the oldest first."""
    return sorted(_reader(workdir).all_steps()) if (workdir / "checkpoints").is_dir() else []


def restore_params(workdir: pathlib.Path, step: int, like: Params) -> Params:
    """Read the trained weights as they were after `step`, without the rest of the state.

    Args:
      workdir: of the run. step: of one of its checkpoints. like: shapes and shardings of the weights.
    Returns: the weights, like `like`.
    Raises: UserError if they were saved from another structure.
    """
    return _restore(_reader(workdir), step, {"params": like})["params"]


def _reader(workdir: pathlib.Path) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(read_only=True)
    return ocp.CheckpointManager((workdir / "checkpoints").absolute(), options=options)


def _restore(manager: ocp.CheckpointManager, step: int, like: dict[str, Any]) -> dict[str, Any]:
    """Read some fields of a saved state, by their names; like: their shapes and shardings."""
    manager.wait_until_finished()  # the step may be the one that is being written
    _check_fits(manager.directory / str(step), like)
    restore_args = ocp.checkpoint_utils.construct_restore_args(like)
    # Partial: one who only wants the weights need not read Adam's moments, twice their bytes, and a field that a later version
    # adds or leaves out is no reason to refuse what is there.
    args = ocp.args.PyTreeRestore(item=like, restore_args=restore_args, partial_restore=True)
    try:
        return manager.restore(step, args=ocp.args.Composite(state=args))["state"]
    except (ValueError, KeyError) as error:
        # Orbax's messages go over many lines; the first says what is wrong.
        first = str(error).strip().splitlines()[0]
        raise UserError(f"{manager.directory}/{step}: does not fit this config ({first}); use another --workdir") from error


def _check_fits(folder: Any, like: dict[str, Any]) -> None:
    """Raise UserError naming the first array that the checkpoint lacks, or has in another shape."""
    # Orbax would say so too, but in the middle of reading: what it has begun stays behind and complains when Python ends.
    metadata: Any = ocp.PyTreeCheckpointer().metadata(folder / "state")
    stored = {path_names(path): x.shape for path, x in jax.tree_util.tree_leaves_with_path(metadata.item_metadata.tree)}
    for path, x in jax.tree_util.tree_leaves_with_path(like):
        found = stored.get(path_names(path), "missing")
        if found != x.shape:
            name = ".".join(path_names(path))
            raise UserError(
                f"{folder}: does not fit this config ({name} is {found}, the config asks for shape {x.shape}); "
                "use another --workdir"
            )


_BLANK = TrainState(*(None for field in dataclasses.fields(TrainState)))  # pyright: ignore[reportArgumentType]


def saved_fields(state: TrainState) -> dict[str, Any]:
    """Pick the fields that a checkpoint holds: all but those that never change and those that are not there."""
    # What never changes is the bulk of a state (a base under adapters, a reference as large as the policy); its source is on
    # disk already. The hyperparams come from the config, so that a run resumed with --allow_config_change has the new ones.
    frozen = ("base", "ref_params", "hyperparams")
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    return {name: value for name, value in fields.items() if name not in frozen and value is not None}


def init_workdir(workdir: pathlib.Path, config: dict[str, Any], *, allow_config_change: bool) -> None:
    """Write the config into a new workdir; in an old one, refuse if it was made by another config.

    Args:
      workdir: folder of the run. config: as a plain dict. allow_config_change: do not compare it with the old one.
    Raises: UserError naming the first fields that differ, or that the folder cannot be written.
    """
    if not allow_config_change:
        check_same_config(workdir, config)
    if hosts.is_first():
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            write_atomically(workdir / "config.json", json.dumps(config, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"--workdir={workdir}: cannot be written ({error.strerror}); choose another folder") from error
    # The other processes wait until the file is written. Then each looks for it: a --workdir on a disk of its own is a one-line
    # error here, and not a failure in the middle of a save.
    hosts.broadcast_from_process0(np.zeros(()))
    deadline = time.monotonic() + SEEN_WITHIN_SECS
    while not (workdir / "config.json").exists():
        if time.monotonic() > deadline:
            raise UserError(f"--workdir={workdir}: not the folder that the first host writes; take one that all hosts share")
        time.sleep(1)


def check_same_config(workdir: pathlib.Path, config: dict[str, Any]) -> None:
    """Raises UserError naming the first fields that differ, if the workdir is that of a run with another config."""
    path = workdir / "config.json"
    if not path.exists():
        return
    # What is compared is what JSON makes of it (tuples become lists), and an older version's file is brought up to date first.
    differences = list(_differences(complete(read_settings(workdir)), json.loads(json.dumps(config)), "config"))
    if differences:
        raise UserError(
            f"{path}: written by another config: {'; '.join(differences[:3])}; "
            "use another --workdir, or --allow_config_change to go on with the new settings"
        )


def read_settings(workdir: pathlib.Path) -> dict[str, Any]:
    """Read the settings that a run was started with, as they are in its config.json; of a damaged one its newest checkpoint's.

    Raises: UserError if the folder is not that of a run, or none of its copies can be read.
    """
    path = workdir / "config.json"
    if not path.exists():
        raise UserError(f"{path}: no such file; --workdir must be the folder of a training run")
    try:
        return read_json(path, "delete the folder, or start its run again with another --workdir")
    except UserError as error:
        for step in reversed(saved_steps(workdir)):
            with contextlib.suppress(UserError):
                settings = read_json(workdir / "checkpoints" / str(step) / "config" / "metadata")
                note_once(f"{error.args[0].split(';')[0]}; taken from the checkpoint of step {step}")
                return settings
        raise


def read_config(workdir: pathlib.Path) -> Config:
    """Read the config that the run was started with. Raises UserError if the folder is not that of a run."""
    settings = read_settings(workdir)
    try:
        return parse_config(complete(settings))
    except UserError as error:
        raise UserError(f"{workdir}/config.json: {error}") from None


def _differences(old: Any, new: Any, where: str):
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _differences(old.get(key), new.get(key), f"{where}.{key}")
    elif old != new:
        yield f"{where} was {old!r}, now {new!r}"
