"""Common to the programs: flags, --help, and errors as one line with exit status 2."""

from __future__ import annotations

import errno
import importlib.util
import math
import pathlib
import re
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from grpo_jax.config import Config, parse_config
from grpo_jax.config.aliases import RENAMED, upgrade_setting
from grpo_jax.errors import UserError
from grpo_jax.files import is_text, printable
from grpo_jax.parallel import hosts
from grpo_jax.training.checkpoint import read_newest, require_step
from grpo_jax.training.run import Run
from grpo_jax.training.runlog import points, read_metrics
from grpo_jax.training.settings import read_config
from grpo_jax.types import Params

EXIT_INTERRUPTED = 128 + signal.SIGINT
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENAMETOOLONG, errno.EISDIR)
EXIT_BAD_INPUT = 2
HUGE_PAGES = "glibc.malloc.hugetlb=1"  # as GLIBC_TUNABLES when a process starts: a compiled call faults its memory in anew
INSTALLED = pathlib.Path(__file__).parent.parent.parent  # the folder of `configs`, in a clone and where pip puts it
CONFIG = config_flags.DEFINE_config_file(
    "config", None, "configs/<variant>.py[:scale], e.g. configs/dapo.py:tiny; --config.<field>=... overrides a field"
)
STEP = flags.DEFINE_string(
    "step", None, "checkpoint to take, its step or best (of config.checkpoint.keep_best); default: the newest that can be read"
)
STRICT = flags.DEFINE_bool("strict", False, "a damaged checkpoint is an error: no older one is taken in its place")
WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run: checkpoints, metrics, completions, pictures")


def run(main: Callable[[], Any]) -> None:
    """Parse flags and call `main`; bad input ends with one line on stderr and status 2."""
    logging.set_verbosity(logging.FATAL)  # Orbax reports every file; its errors are raised too
    _add_to_help(main.__module__)
    # Flags are parsed before `_call` begins, so what they raise is caught here.
    try:
        app.run(lambda _: _call(main), flags_parser=_parse)
    except UserError as error:
        fail(str(error))


def _add_to_help(command: str) -> None:
    """Make --help show a command's docstring and flags. command: name of its module."""
    # absl shows those of the main module alone, which for most programs is three lines that import the command.
    for module in (command, __name__):
        for flag in flags.FLAGS.get_flags_for_module(module):
            flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
    about = sys.modules[command].__doc__ or ""
    sys.modules["__main__"].__doc__ = about.replace("%", "%%")  # absl takes a docstring for a format of printf


def config_from_flags() -> Config:
    """Return the validated config of --config and its overrides. Raises UserError."""
    if CONFIG.value is None:
        raise UserError("--config is missing; for example --config=configs/dapo.py:tiny")
    return parse_config(CONFIG.value)


def load_config(name: str, field: str) -> Any:
    """Load configs/dapo.py:tiny as a ConfigDict, to be changed or to become a Config. Raises UserError if it does not exist.

    field: where the name was given, for the message.
    """
    path, _, scale = name.partition(":")
    # By its file, not imported by its name: `configs` need not be on the path, and a user's own file may be anywhere.
    spec = importlib.util.spec_from_file_location(pathlib.Path(path).stem, find_config_file(path))
    if spec is None or spec.loader is None or not find_config_file(path).is_file():
        raise UserError(f"{field}: no file {path}; give configs/<variant>.py[:scale]")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    scales = [scale] if scale else []  # without one the file's own default
    try:
        return module.get_config(*scales)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def find_config_file(path: str) -> pathlib.Path:
    """Find a config file, seen from the working directory or else from the package: configs/dapo.py is found anywhere."""
    here, installed = pathlib.Path(path), INSTALLED / path
    if not here.is_file() and installed.is_file():
        return installed
    return here  # also if it is absent: the message then names the path as it was given


def workdir_of(text: str) -> pathlib.Path:
    """Return a flag's folder. Raises UserError if no file system could have it."""
    if not is_text(text):
        raise UserError(f"--workdir={text!r}: a zero byte or half a character is no part of a folder's name")
    return pathlib.Path(text)


def chosen_step(workdir: pathlib.Path) -> int | None:
    """Return the step of --step; None: the newest. Raises UserError if it is no step of a checkpoint."""
    text = STEP.value
    if text is None:
        return None
    if text == "best":
        step = best_step(workdir)
    elif text.isascii() and text.isdigit():
        step = int(text)
    else:
        raise UserError(f"--step={text}: expected a number, or best")
    require_step(workdir, step)
    return step


def best_step(workdir: pathlib.Path) -> int:
    """Return the step that config.checkpoint.keep_best of a run has kept. Raises UserError if there is none."""
    name = read_config(workdir).checkpoint.keep_best
    values = {int(step): value for step, value in points(read_metrics(workdir), name) if step > 0 and math.isfinite(value)}
    if not name or not values:
        raise UserError(f"--step=best: {workdir} has none; its config.checkpoint.keep_best is {name!r}")
    return max(values, key=lambda step: (values[step], -step))


def restore_policy(run: Run, workdir: pathlib.Path, step: int | None, *, is_strict: bool = False) -> tuple[int, Params]:
    """Read the policy of a step, or of the newest checkpoint that can be read.

    Args:
      run: of the workdir. workdir: with its checkpoints. step: of one of them; None: the newest. is_strict: no older one.
    Returns: (the step, all weights).
    Raises: UserError if it is not there or damaged.
    """
    require_step(workdir, step)
    found = read_newest(workdir, lambda each: run.restore_policy(workdir, each), step, is_strict=is_strict)
    assert found is not None, "there is a checkpoint, and it was neither read nor refused"
    return found


def fail(message: str, status: int = EXIT_BAD_INPUT) -> None:
    """Write one line on stderr and end the process."""
    print(f"error: {printable(message)}", file=sys.stderr)
    # An ordinary exit of one of several processes waits for the others, which wait for it in a collective call.
    if hosts.is_joined():
        hosts.exit_without_barrier(status)
    sys.exit(status)


def _call(main: Callable[[], Any]) -> None:
    """Call `main`, so that an error of one process ends it at once also where others run beside it."""
    try:
        main()
    except UserError as error:
        fail(str(error), error.status)
    except KeyboardInterrupt:
        fail("interrupted before there was anything to save", EXIT_INTERRUPTED)
    except OSError as error:
        # Of a file that cannot be opened or written a traceback tells nothing; of any other error it may.
        if error.errno not in UNWRITABLE:
            raise
        fail(f"{error.filename or 'a file'}: {error.strerror}", status=1)
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        first = (str(error).strip() or "MemoryError").splitlines()[0]
        fail(f"out of memory: {first}; python -m experiments.plan says what a config needs", status=1)
    except BaseException:
        if hosts.is_joined():
            traceback.print_exc()
            hosts.exit_without_barrier(status=1)
        raise


def _parse(argv: list[str]) -> list[str]:
    """Parse flags and the config file they name. What the flag libraries raise becomes one line."""
    # Renamed fields are upgraded before ml_collections sees them: it would call an old name unknown and suggest another.
    argv = ["--allow_config_change=" if each == "--allow_config_change" else each for each in argv]  # of nothing by name
    try:
        rest = flags.FLAGS(_locate_config_file([_upgrade(each) for each in argv]))
    except (AttributeError, KeyError) as error:
        raise UserError(_explain_unknown_field(str(error), argv)) from None
    except (flags.Error, TypeError, ValueError, ImportError) as error:
        last = str(error).strip().splitlines()[-1]  # a config file's own traceback ends with what matters
        raise UserError(last.removeprefix("ValueError: ")) from None
    if len(rest) > 1:
        raise UserError(f"{rest[1]!r}: not a flag; settings are written --config.<field>=<value>")
    return rest


def _upgrade(arg: str) -> str:
    """Return --config.<old name>=value under the field's new name; anything else as it is."""
    name, equals, value = arg.partition("=")
    if name.removeprefix("--config.") not in RENAMED:
        return arg
    new_name, value = upgrade_setting(name.removeprefix("--config."), value)
    return f"--config.{new_name}{equals}{value}"


def _explain_unknown_field(text: str, argv: list[str]) -> str:
    """Turn ConfigDict's complaint about an unknown key into the flag that has it, and the suggestion if there is one."""
    # The complaint names the last part of the field alone: the flag is found by looking which one has a part of that name.
    names = re.findall(r"\w+", text)
    overrides = [arg.split("=")[0] for arg in argv if arg.startswith("--config.")]
    flag = next((each for each in overrides if set(each.split(".")) & set(names)), "--config")
    close = re.search(r'Did you mean "(\w+)"', text)
    if close:
        return f"{flag}: unknown field; did you mean {close[1]!r}?"
    return f"{flag}: unknown field; configs/base.py lists them all"


def _locate_config_file(argv: list[str]) -> list[str]:
    """Return the flags, with the config file's path where it was found."""
    chosen = next((arg.split("=", 1)[1] for arg in argv if arg.startswith("--config=")), None)
    if chosen is None:
        return argv
    name, colon, scale = chosen.partition(":")
    path = find_config_file(name)
    if not path.is_file():
        known = sorted(str(each) for each in path.parent.glob("*.py") if each.stem not in ("base", "__init__"))
        raise UserError(f"--config={chosen}: no file {path}; known here: {', '.join(known) or 'none'}")
    return [f"--config={path}{colon}{scale}" if arg == f"--config={chosen}" else arg for arg in argv]
