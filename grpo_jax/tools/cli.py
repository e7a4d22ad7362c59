"""What the programs share: flags, and errors as one line with exit status 2."""

from __future__ import annotations

import importlib.util
import pathlib
import re
import sys
import traceback
from collections.abc import Callable
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from grpo_jax.config import Config, parse_config
from grpo_jax.config.aliases import RENAMED, upgrade_setting
from grpo_jax.errors import UserError
from grpo_jax.parallel import hosts
from grpo_jax.training.checkpoint import saved_steps

EXIT_BAD_INPUT = 2
HUGE_PAGES = "glibc.malloc.hugetlb=1"  # as GLIBC_TUNABLES when a process starts: a compiled call faults its memory in anew
INSTALLED = pathlib.Path(__file__).parent.parent.parent  # where `configs` lies, in a clone and where pip puts it
CONFIG = config_flags.DEFINE_config_file(
    "config", None, "configs/<variant>.py[:scale], e.g. configs/dapo.py:tiny; --config.<field>=... overrides a field"
)
STEP = flags.DEFINE_integer("step", None, "checkpoint to take; default: the newest")
WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run: checkpoints, metrics, completions, pictures")


def run(main: Callable[[], Any]) -> None:
    """Parse flags and call `main`; bad input ends with one line on stderr and status 2."""
    logging.set_verbosity(logging.ERROR)  # Orbax reports every file, and warns that it only reads where it only reads
    try:
        app.run(lambda _: _guarded(main), flags_parser=_parse)
    except UserError as error:
        fail(str(error))


def config_from_flags() -> Config:
    """The validated config of --config and its overrides. Raises UserError."""
    if CONFIG.value is None:
        raise UserError("--config is missing; for example --config=configs/dapo.py:tiny")
    return parse_config(CONFIG.value)


def load_config(name: str, field: str) -> Any:
    """configs/dapo.py:tiny -> its ConfigDict, to be changed or to become a Config. Raises UserError if there is no such one.

    field: where the name was given, for the message.
    """
    path, _, scale = name.partition(":")
    spec = importlib.util.spec_from_file_location(pathlib.Path(path).stem, find_config_file(path))
    if spec is None or spec.loader is None or not find_config_file(path).is_file():
        raise UserError(f"{field}: no file {path}; give configs/<variant>.py[:scale]")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        return module.get_config(*([scale] if scale else []))
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def find_config_file(path: str) -> pathlib.Path:
    """A config file, seen from the working directory or else from where the package is: configs/dapo.py is found anywhere."""
    here, installed = pathlib.Path(path), INSTALLED / path
    return installed if installed.is_file() and not here.is_file() else here


def choose_step(workdir: pathlib.Path, step: int | None) -> int:
    """`step` if the workdir has that checkpoint; None: the newest. Raises UserError if there is none, or not that one."""
    steps = saved_steps(workdir)
    if not steps:
        raise UserError(
            f"--workdir={workdir}: no finished checkpoint in it; train first, and with config.checkpoint.keep above 0"
        )
    if step is not None and step not in steps:
        raise UserError(f"--step={step}: no such checkpoint in {workdir}; there are: {', '.join(map(str, steps))}")
    return steps[-1] if step is None else step


def fail(message: str) -> None:
    """One line, then out."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    if hosts.is_joined():
        hosts.exit_without_barrier(EXIT_BAD_INPUT)
    sys.exit(EXIT_BAD_INPUT)


def _guarded(main: Callable[[], Any]) -> None:
    try:
        main()
    except UserError as error:
        fail(str(error))
    except BaseException:
        if hosts.is_joined():
            traceback.print_exc()
            hosts.exit_without_barrier(status=1)
        raise


def _parse(argv: list[str]) -> list[str]:
    """Flags and the config file they name. What the flag libraries raise is turned into one line."""
    try:
        rest = flags.FLAGS(_with_config_file([_upgraded(each) for each in argv]))
    except (AttributeError, KeyError) as error:
        raise UserError(_unknown_field(str(error), argv)) from None
    except (flags.Error, TypeError, ValueError, ImportError) as error:
        last = str(error).strip().splitlines()[-1]  # a config file's own traceback ends with what matters
        raise UserError(last.removeprefix("ValueError: ")) from None
    if len(rest) > 1:
        raise UserError(f"{rest[1]!r}: not a flag; settings are written --config.<field>=<value>")
    return rest


def _upgraded(arg: str) -> str:
    """--config.<old name>=value under the field's new name; anything else as it is."""
    name, equals, value = arg.partition("=")
    if name.removeprefix("--config.") not in RENAMED:
        return arg
    new_name, value = upgrade_setting(name.removeprefix("--config."), value)
    return f"--config.{new_name}{equals}{value}"


def _unknown_field(text: str, argv: list[str]) -> str:
    """ConfigDict's complaint about an unknown key -> the flag that has it, and the suggestion if there is one."""
    names = re.findall(r"\w+", text)
    overrides = [arg.split("=")[0] for arg in argv if arg.startswith("--config.")]
    flag = next((each for each in overrides if set(each.split(".")) & set(names)), "--config")
    close = re.search(r'Did you mean "(\w+)"', text)
    return f"{flag}: unknown field; " + (f"did you mean {close[1]!r}?" if close else "configs/base.py lists them all")


def _with_config_file(argv: list[str]) -> list[str]:
    """The flags, with the config file where it lies."""
    chosen = next((arg.split("=", 1)[1] for arg in argv if arg.startswith("--config=")), None)
    if chosen is None:
        return argv
    name, colon, scale = chosen.partition(":")
    path = find_config_file(name)
    if not path.is_file():
        known = sorted(str(each) for each in path.parent.glob("*.py") if each.stem not in ("base", "__init__"))
        raise UserError(f"--config={chosen}: no file {path}; known here: {', '.join(known) or 'none'}")
    return [f"--config={path}{colon}{scale}" if arg == f"--config={chosen}" else arg for arg in argv]
