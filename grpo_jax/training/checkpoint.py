"""The run's state on disk: Orbax, written in the background, the newest few kept; killed at any moment, it resumes."""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from grpo_jax.config import CheckpointConfig
from grpo_jax.errors import RunError, UserError
from grpo_jax.parallel import hosts
from grpo_jax.parallel.finite import find_not_finite
from grpo_jax.parallel.sharding import path_names
from grpo_jax.training.checksums import find_damage, write_checksums
from grpo_jax.types import Params, TrainState

Restored = TypeVar("Restored")


class DamagedCheckpointError(RunError):
    """A checkpoint that cannot be read, or is not what was written."""


@dataclasses.dataclass
class KeepStep:
    """A policy of Orbax that preserves one step, which changes."""

    step: int = -1

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Tell it of each checkpoint."""
        del context
        return [each.step == self.step for each in checkpoints]


class Checkpointer:
    """Saves and restores TrainState under `<workdir>/checkpoints`. A save that was cut off is never restored.

    What never changes (`base`, `ref_params`, `hyperparams`) is left out and reloaded from its source.
    """

    def __init__(self, workdir: pathlib.Path, config: CheckpointConfig):
        self.workdir, self._folder = workdir, (workdir / "checkpoints").absolute()
        self._saving = -1  # the step that is being written
        self.best = KeepStep()
        policies = ocp.checkpoint_managers
        # keep = 0 is about finished runs (`trainer.finalize_run`): one under way needs a checkpoint to resume from.
        kept: list[Any] = [policies.LatestN(max(config.keep, 1)), self.best]
        if config.keep_every:
            kept.append(policies.EveryNSteps(config.keep_every))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(kept),
            create=True,
            enable_async_checkpointing=True,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._write_checksums),
        )
        self._manager = ocp.CheckpointManager(self._folder, options=options)

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
        self._manager.wait_until_finished()  # the callback below must know which step it is called for
        self._saving = step
        self._manager.save(step, args=items)

    def _write_checksums(self) -> None:
        """Write the checksums of a step whose files are all there, in the thread that writes it."""
        # Before Orbax gives the folder its final name: a checkpoint never exists without them.
        for folder in self._folder.glob(f"{self._saving}.*tmp*"):
            write_checksums(folder)

    def restore(self, step: int, like: TrainState) -> TrainState:
        """Read the state saved at `step`, sharded like `like`.

        Raises: UserError if it was saved from another structure, DamagedCheckpointError if it is not what was written.
        """
        self._manager.wait_until_finished()  # the step may be the one that is being written
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), saved_fields(like))
        return dataclasses.replace(_BLANK, **_restore(self._manager, step, abstract))

    def restore_newest(
        self, restore: Callable[[int], Restored], step: int | None = None, *, is_strict: bool = False
    ) -> tuple[int, Restored] | None:
        """Read the newest checkpoint that can be read, and set those aside that are behind it.

        Args:
          restore: reads a step, as `restore` does. step: take this one, whatever there is behind it.
          is_strict: do not fall back on an older one.
        Returns: (its step, what was read), or None if nothing was ever saved.
        Raises: DamagedCheckpointError if there are some and none can be read, or not the one that was asked for.
        """
        found = read_newest(self.workdir, restore, step, is_strict=is_strict)
        if found is not None:
            self._set_aside([each for each in numbered_folders(self.workdir) if each > found[0]])
        return found

    def _set_aside(self, steps: Sequence[int]) -> None:
        """Take the steps out of the way of the same ones, which the run comes to again. Nothing is deleted."""
        if not steps:
            return
        if hosts.is_first():
            for step in steps:
                names = (self._folder / f"aside-{i}-{step}" for i in itertools.count())
                to = next(path for path in names if not path.exists())
                (self._folder / str(step)).rename(to)
                hosts.say(f"{self._folder}/{step}: renamed to {to.name}; delete it if you do not need it")
        hosts.broadcast_from_process0(np.zeros(()))
        self._manager.reload()

    def close(self) -> None:
        """Wait for the last save and release the threads."""
        self._manager.wait_until_finished()
        self._manager.close()


def numbered_folders(workdir: pathlib.Path) -> list[int]:
    """List the numbers of all that is named like a checkpoint in a workdir, the smallest first."""
    folder = workdir / "checkpoints"
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isascii() and path.name.isdigit())


def saved_steps(workdir: pathlib.Path) -> list[int]:
    """List the steps of all finished checkpoints in a workdir, the oldest first. Whether they can be read is not looked at."""
    # One that is being written, or was cut off, has another name; an empty folder is none.
    return [step for step in numbered_folders(workdir) if (workdir / "checkpoints" / str(step) / "state").is_dir()]


def read_newest(
    workdir: pathlib.Path, restore: Callable[[int], Restored], step: int | None = None, *, is_strict: bool = False
) -> tuple[int, Restored] | None:
    """Read the newest checkpoint of a workdir that can be read, and say why each newer one cannot.

    Args:
      workdir: of the run. restore, step, is_strict: as in `Checkpointer.restore_newest`.
    Returns: (its step, what was read), or None if there is none.
    Raises: DamagedCheckpointError.
    """
    steps = numbered_folders(workdir)
    if step is not None:
        require_step(workdir, step)
        steps = [step]
    reasons = []
    for each in reversed(steps):
        try:
            return each, restore(each)
        except DamagedCheckpointError as error:
            if is_strict or step is not None:
                raise
            reasons.append(str(error))
            hosts.say(f"{error}; going on from an older one")
    if reasons:
        raise DamagedCheckpointError(
            f"{reasons[0]}; none of the {len(reasons)} checkpoint(s) there can be read: take another --workdir, or delete "
            f"{workdir} to begin anew"
        )
    return None


def require_step(workdir: pathlib.Path, step: int | None) -> None:
    """Raise UserError if a workdir has no checkpoint, or not that of `step` (None: any)."""
    steps = saved_steps(workdir)
    if not steps:
        raise UserError(
            f"--workdir={workdir}: no finished checkpoint in it; train first, and with config.checkpoint.keep above 0"
        )
    if step is not None and step not in steps:
        raise UserError(f"--step={step}: no such checkpoint in {workdir}; there are: {', '.join(map(str, steps))}")


def restore_params(workdir: pathlib.Path, step: int, like: Params) -> Params:
    """Read the trained weights as they were after `step`, without the rest of the state.

    Args:
      workdir: of the run. step: of one of its checkpoints. like: shapes and shardings of the weights.
    Returns: the weights, like `like`.
    Raises: UserError if they were saved from another structure, DamagedCheckpointError if they are not what was written.
    """
    options = ocp.CheckpointManagerOptions(read_only=True)  # its run may be at work there
    with ocp.CheckpointManager((workdir / "checkpoints").absolute(), options=options) as manager:
        return _restore(manager, step, {"params": like})["params"]


def _restore(manager: ocp.CheckpointManager, step: int, like: dict[str, Any]) -> dict[str, Any]:
    """Read some fields of a saved state, by their names; like: their shapes and shardings."""
    folder = pathlib.Path(manager.directory) / str(step)
    # Nothing of a file is looked at before it is known to be what was written: it may be nonsense of any kind.
    damage = _damage_as_first_sees_it(folder)
    if damage:
        raise DamagedCheckpointError(f"{folder}: damaged ({damage})")
    try:
        stored = _stored_shapes(folder)
        written = as_written(like, stored)
        _check_fits(folder, written, stored)
        # Partial: one who only wants the weights need not read Adam's moments, twice their bytes, and a field that a later
        # version adds or leaves out is no reason to refuse what is there.
        restore_args = ocp.checkpoint_utils.construct_restore_args(written)
        args = ocp.args.PyTreeRestore(item=written, restore_args=restore_args, partial_restore=True)
        restored = as_today(manager.restore(step, args=ocp.args.Composite(state=args))["state"], like)
    except UserError:
        raise
    except Exception as error:  # Orbax and TensorStore raise whatever they meet in files that nobody vouches for
        first = (str(error).strip() or type(error).__name__).splitlines()[0]  # the others are details of details
        raise DamagedCheckpointError(f"{folder}: cannot be read ({first})") from error
    broken = find_not_finite(restored)
    if broken:
        raise DamagedCheckpointError(f"{folder}: {'.'.join(path_names(broken[0][0]))} holds NaN or infinity")
    return restored


def _damage_as_first_sees_it(folder: pathlib.Path) -> str | None:
    """Return `find_damage` of a step's folder in the first process, and say if it cannot be told; the others get its word."""
    damage: str | None = ""
    if hosts.is_first():
        damage = "no checkpoint is in it" if not (folder / "state").is_dir() else find_damage(folder)
        if damage is None:
            hosts.say(f"{folder}: no checksums.json, an older version wrote it; read as it is")
    codes = (None, "")
    known = hosts.broadcast_from_process0(np.asarray(codes.index(damage) if damage in codes else -1))
    if int(known) >= 0:
        return codes[int(known)]
    return damage or "the first process says so"


def _stored_shapes(folder: pathlib.Path) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Read the shapes of a checkpoint's arrays, by their names."""
    metadata: Any = ocp.PyTreeCheckpointer().metadata(folder / "state")
    return {path_names(path): x.shape for path, x in jax.tree_util.tree_leaves_with_path(metadata.item_metadata.tree)}


def _check_fits(folder: pathlib.Path, like: dict[str, Any], stored: Mapping[tuple[str, ...], tuple[int, ...]]) -> None:
    """Raise UserError naming the first array that the checkpoint lacks, or has in another shape."""
    # Orbax would say so too, but in the middle of reading: what it has begun stays behind and complains when Python ends.
    for path, x in jax.tree_util.tree_leaves_with_path(like):
        found = stored.get(path_names(path), "missing")
        if found != x.shape:
            name = ".".join(path_names(path))
            raise UserError(
                f"{folder}: does not fit this config ({name} is {found}, the config asks for shape {x.shape}); use another "
                "--workdir, or the settings and the version of grpo_jax that it was written with"
            )


# A checkpoint of an older version lacks what there was no need of then, and has another name for what was renamed.
RENAMED = {"next_batch": "ahead"}
SCORED = "is_scored_PG"  # all rows of a batch had a score


def as_written(like: Mapping[str, Any], stored: Collection[tuple[str, ...]]) -> dict[str, Any]:
    """Return fields of a state as the version that wrote them had them.

    Args:
      like: the fields today. stored: names of the arrays in the checkpoint.
    Returns: the fields under their names then, None for what was not there.
    """
    fields = {name for name, *_ in stored}
    older = {name: RENAMED[name] for name in like if name in RENAMED and name not in fields and RENAMED[name] in fields}
    written = {older.get(name, name): field for name, field in like.items()}

    def keep(path: tuple[Any, ...], x: Any) -> Any:
        names = path_names(path)
        return None if names[-1] == SCORED and names not in stored else x

    return jax.tree_util.tree_map_with_path(keep, written)


def as_today(restored: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `as_written`. restored: the arrays. like: the fields today."""
    newer = {older: name for name, older in RENAMED.items()}
    renamed = {newer.get(name, name): field for name, field in restored.items()}
    found = {path_names(path): x for path, x in jax.tree_util.tree_leaves_with_path(renamed)}

    def take(path: tuple[Any, ...], x: Any) -> Any:
        if path_names(path) in found:
            return found[path_names(path)]
        return jax.device_put(np.ones(x.shape, x.dtype), x.sharding)

    return jax.tree_util.tree_map_with_path(take, dict(like))


_NOTHING = {field.name: None for field in dataclasses.fields(TrainState)} | {"later_batches": ()}
_BLANK = TrainState(**_NOTHING)  # pyright: ignore[reportArgumentType]


def saved_fields(state: TrainState) -> dict[str, Any]:
    """Pick the fields that a checkpoint holds: all but those that never change and those that are not there."""
    # What never changes is the bulk of a state (a base under adapters, a reference as large as the policy); its source is on
    # disk already. The hyperparams come from the config, so that a run resumed with --allow_config_change has the new ones.
    frozen = ("base", "ref_params", "hyperparams")
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    absent = [name for name, value in fields.items() if value is None]
    if not state.later_batches:
        absent.append("later_batches")
    return {name: value for name, value in fields.items() if name not in (*frozen, *absent)}
