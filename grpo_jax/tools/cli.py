"""Common to the programs: flags, --help, and errors as one line with exit status 2."""

from __future__ import annotations

import ast
import importlib.util
import logging
import pathlib
import re
import sys
import traceback
from collections.abc import Callable
from typing import Any

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from grpo_jax.config import Config, parse_config
from grpo_jax.config.aliases import RENAMED, upgrade_setting
from grpo_jax.errors import RunError, UserError
from grpo_jax.parallel import hosts
from grpo_jax.training.checkpoint import saved_steps

EXIT_BAD_INPUT, EXIT_FAILED = 2, 1
PARAMS = "--config.reward.params."  # fields of any name
HUGE_PAGES = "glibc.malloc.hugetlb=1"  # as GLIBC_TUNABLES when a process starts: a compiled call faults its memory in anew
INSTALLED = pathlib.Path(__file__).parent.parent.parent  # the folder of `configs`, in a clone and where pip puts it
CONFIG = config_flags.DEFINE_config_file(
    "config", None, "configs/<variant>.py[:scale], e.g. configs/dapo.py:tiny; --config.<field>=... overrides a field"
)
STEP = flags.DEFINE_integer("step", None, "checkpoint to take; default: the newest")
WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run: checkpoints, metrics, completions, pictures")


def run(main: Callable[[], Any]) -> None:
    """Parse flags and call `main`; bad input ends with one line on stderr and status 2."""
    absl_logging.set_verbosity(absl_logging.ERROR)  # Orbax reports every file, and warns that it only reads where it only reads
    show_own_messages()
    _add_to_help(main.__module__)
    # Flags are parsed before `_call` begins, so what they raise is caught here.
    try:
        app.run(lambda _: _call(main), flags_parser=_parse)
    except UserError as error:
        fail(str(error))


def show_own_messages() -> None:
    """Let this package's own log reach stderr, warnings with their name, each message once."""
    # By a handler of its own: what the level above silences are other libraries, and no message here may go with them.
    own = logging.getLogger("grpo_jax")
    if any(isinstance(handler, OwnMessages) for handler in own.handlers):
        return
    own.addHandler(OwnMessages())
    own.setLevel(logging.INFO)
    own.propagate = False


class OwnMessages(logging.Handler):
    """Writes each message to stderr once."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record that has not been written yet."""
        text = record.getMessage()
        if record.levelno > logging.INFO:
            text = f"{record.levelname.lower()}: {text}"
        if text not in self._seen:
            self._seen.add(text)
            print(text, file=sys.stderr, flush=True)


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


def choose_step(workdir: pathlib.Path, step: int | None) -> int:
    """Return `step` if the workdir has that checkpoint; None: the newest. Raises UserError if there is none or not that one."""
    steps = saved_steps(workdir)
    if not steps:
        raise UserError(
            f"--workdir={workdir}: no finished checkpoint in it; train first, and with config.checkpoint.keep above 0"
        )
    if step is None:
        return steps[-1]
    if step not in steps:
        raise UserError(f"--step={step}: no such checkpoint in {workdir}; there are: {', '.join(map(str, steps))}")
    return step


def fail(message: str, status: int = EXIT_BAD_INPUT) -> None:
    """Write one line on stderr and end the process."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    # An ordinary exit of one of several processes waits for the others, which wait for it in a collective call.
    if hosts.is_joined():
        hosts.exit_without_barrier(status)
    sys.exit(status)


def _call(main: Callable[[], Any]) -> None:
    """Call `main`, so that an error of one process ends it at once also where others run beside it."""
    try:
        main()
    except UserError as error:
        fail(str(error))
    except RunError as error:
        fail(str(error), EXIT_FAILED)
    except BaseException:
        if hosts.is_joined():
            traceback.print_exc()
            hosts.exit_without_barrier(status=1)
        raise


def _parse(argv: list[str]) -> list[str]:
    """Parse flags and the config file they name. What the flag libraries raise becomes one line."""
    # Renamed fields are upgraded before ml_collections sees them: it would call an old name unknown and suggest another.
    params, argv = _split_params(argv)
    # ConfigDict's flag looks for its fields there, and not among those it is given.
    sys.argv = _split_params(sys.argv)[1]
    try:
        rest = flags.FLAGS(_locate_config_file([_upgrade(each) for each in argv]))
        if params and CONFIG.value is not None:
            with CONFIG.value.unlocked():
                CONFIG.value.reward.params.update(params)
    except (AttributeError, KeyError) as error:
        raise UserError(_explain_unknown_field(str(error), argv)) from None
    except (flags.Error, TypeError, ValueError, ImportError) as error:
        last = str(error).strip().splitlines()[-1]  # a config file's own traceback ends with what matters
        raise UserError(last.removeprefix("ValueError: ")) from None
    if len(rest) > 1:
        raise UserError(f"{rest[1]!r}: not a flag; settings are written --config.<field>=<value>")
    return rest


def _split_params(argv: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Take --config.reward.params.<name>=value out of the flags, for ConfigDict knows no field by these names."""
    params, rest = {}, []
    for arg in argv:
        name, equals, text = arg.removeprefix(PARAMS).partition("=")
        if not arg.startswith(PARAMS) or not equals:
            rest.append(arg)
            continue
        # As in --set of a sweep: text that is no Python value stays text.
        try:
            params[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            params[name] = text
    return params, rest


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
