"""Common to the commands: flags, --help, and errors as one line with exit status 2.

Imported by every command before it knows what it is asked for, so jax and what imports it wait until they are needed.
"""

from __future__ import annotations

import argparse
import ast
import errno
import importlib.util
import logging
import math
import pathlib
import re
import signal
import sys
import textwrap
import threading
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from grpo_jax.errors import UserError
from grpo_jax.files import is_text, note_once, printable
from grpo_jax.screen import keep_standard_streams

if TYPE_CHECKING:
    from grpo_jax.config import Config
    from grpo_jax.training.run import Run
    from grpo_jax.types import Params

EXIT_INTERRUPTED = 128 + signal.SIGINT
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENAMETOOLONG, errno.EISDIR)
EXIT_BAD_INPUT = 2
FREE_FIELD = re.compile(r"--config\.(reward|objective|task)\.params(?:\.(\w+))?(?:=(.*))?$", re.S)  # fields of any name
HUGE_PAGES = "glibc.malloc.hugetlb=1"  # as GLIBC_TUNABLES when a process starts: a compiled call faults its memory in anew
SHIPPED = pathlib.Path(__file__).parent.parent / "configs"
CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "a shipped config by its name (dapo:tiny, gspo:llm) or a path (my/dapo.py:tiny), scale after the colon; "
    "--config.<field>=<value> overrides a field, `grpo-jax fields` lists them",
)
WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run: checkpoints, metrics, completions, pictures")
STEP = flags.DEFINE_string(
    "step", None, "checkpoint to take, its step or best (of config.checkpoint.keep_best); default: the newest that can be read"
)
STRICT = flags.DEFINE_bool("strict", False, "a damaged checkpoint is an error: no older one is taken in its place")


def run(main: Callable[..., Any], parser: argparse.ArgumentParser | None = None) -> None:
    """Parse the command line and call `main`; bad input ends with one line on stderr and status 2.

    parser: for a command without a config; `main` gets what it parsed. None: absl's flags, those above and the command's.
    """
    keep_standard_streams()
    quiet_other_libraries()
    shorten_background_faults()
    if parser:
        args = parser.parse_args()
        _call(lambda: main(args))
        return
    if {"--help", "-h", "--helpfull", "--helpshort"} & set(sys.argv[1:]):
        print(_help(main.__module__))
        return
    # Flags are parsed before `_call` begins, so what they raise is caught here.
    try:
        app.run(lambda _: _call(main), flags_parser=_parse)
    except UserError as error:
        fail(str(error))


def make_parser(command: str, about: str | None) -> argparse.ArgumentParser:
    """Make the parser of a command that takes no config. about: its module's docstring."""
    return argparse.ArgumentParser(
        prog=f"grpo-jax {command}", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def _help(command: str) -> str:
    """Write a command's docstring and flags, --config and --workdir first. command: name of its module."""
    # absl's own help lists the flags of every module that happens to be imported.
    lines = [sys.modules[command].__doc__ or "", "flags:"]
    own = sorted(flags.FLAGS.get_key_flags_for_module(command), key=lambda flag: flag.name)
    for flag in (*(flags.FLAGS[shared.name] for shared in (CONFIG, WORKDIR)), *own):
        about = flag.help or ""
        if flag.default:
            about = f"{about} (default: {flag.default})"
        lines += [f"  --{flag.name}:", textwrap.indent(textwrap.fill(about, 90), " " * 6)]
    return "\n".join(lines)


def quiet_other_libraries() -> None:
    """Leave what this package has to say as the only messages on stderr."""
    absl_logging.set_verbosity(absl_logging.FATAL)  # Orbax reports every file; its errors are raised too
    show_own_messages()


def shorten_background_faults() -> None:
    """Have a fault of the disk in a thread be one line, and the one of a save that has failed none: it is reported anyway."""
    threading.excepthook = _on_thread_fault
    sys.unraisablehook = _on_unraisable


def _on_thread_fault(args: threading.ExceptHookArgs) -> None:
    from grpo_jax.training.disk import describe_fault

    reason = describe_fault(args.exc_value)
    if reason is None:
        threading.__excepthook__(args)
    else:
        note_once(f"a thread that writes in the background has ended: {reason}")


def _on_unraisable(args: sys.UnraisableHookArgs) -> None:
    # TensorStore's threads report to the event loop of a save, which the first of several faults has closed.
    if not (isinstance(args.exc_value, RuntimeError) and str(args.exc_value) == "Event loop is closed"):
        sys.__unraisablehook__(args)


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


def config_from_flags() -> Config:
    """Return the validated config of --config and its overrides. Raises UserError."""
    from grpo_jax.config import parse_config

    if CONFIG.value is None:
        raise UserError("--config is missing; for example --config=dapo:tiny")
    return parse_config(CONFIG.value)


def load_config(name: str, field: str) -> Any:
    """Load dapo:tiny or my/dapo.py:tiny as a ConfigDict, to be changed or to become a Config.

    field: where the name was given, for the message. Raises UserError if there is no such config.
    """
    path, argument = find_config(name, field)
    # By its file, not imported by its name: a user's own file may be anywhere, and two may have one name.
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    arguments = [argument] if argument else []  # without one the file's own default
    try:
        return module.get_config(*arguments)
    except ValueError as error:
        raise UserError(f"{name.partition(':')[0]}: {error}") from None


def find_config(name: str, field: str = "--config") -> tuple[pathlib.Path, str]:
    """Find the file that a config's name means, and the argument for its get_config.

    A name that ends in .py is a path, seen from the working directory; configs/dapo.py is found anywhere. Other names are
    those of shipped files (dapo, sweeps/variants), of variants and of presets.

    Args:
      name: with the scale after a colon, if one is given.
      field: where the name was given, for the message.
    Returns: the file, and what its get_config takes; "" for its default.
    Raises: UserError naming what is known.
    """
    place, _, scale = name.partition(":")
    if place.endswith(".py"):
        for path in (pathlib.Path(place), SHIPPED / place.removeprefix("configs/")):
            if path.is_file():
                return path, scale
        folder = pathlib.Path(place).parent
        known = ", ".join(sorted(str(each) for each in folder.glob("*.py") if each.stem not in ("base", "__init__")))
        raise UserError(f"{field}: no file {place}; known here: {known or 'none'}")
    if (SHIPPED / f"{place}.py").is_file():
        return SHIPPED / f"{place}.py", scale
    from grpo_jax import objectives

    if place in objectives.VARIANTS:
        return SHIPPED / "variant.py", ",".join(filter(None, (place, scale)))
    sweeps = [f"sweeps/{each.stem}" for each in (SHIPPED / "sweeps").glob("*.py") if each.stem not in ("base", "__init__")]
    known = ", ".join([*objectives.VARIANTS, *sorted(sweeps)])
    raise UserError(f"{field}: no config {place!r} is shipped; give a path that ends in .py, or one of {known}")


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
    from grpo_jax.training.checkpoint import require_step

    require_step(workdir, step)
    return step


def best_step(workdir: pathlib.Path) -> int:
    """Return the step that config.checkpoint.keep_best of a run has kept. Raises UserError if there is none."""
    from grpo_jax.training.runlog import points, read_metrics
    from grpo_jax.training.settings import read_config

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
    from grpo_jax.training.checkpoint import read_newest, require_step

    require_step(workdir, step)
    found = read_newest(workdir, lambda each: run.restore_policy(workdir, each), step, is_strict=is_strict)
    assert found is not None, "there is a checkpoint, and it was neither read nor refused"
    return found


def fail(message: str, status: int = EXIT_BAD_INPUT) -> None:
    """Write one line on stderr and end the process."""
    print(f"error: {printable(message)}", file=sys.stderr)
    # An ordinary exit of one of several processes waits for the others, which wait for it in a collective call.
    if hosts := _joined_hosts():
        hosts.exit_without_barrier(status)
    sys.exit(status)


def _joined_hosts() -> Any:
    """Return grpo_jax.parallel.hosts in a process that is one of several, else None."""
    hosts = sys.modules.get("grpo_jax.parallel.hosts")  # not imported yet: this process has joined nobody
    return hosts if hosts and hosts.is_joined() else None


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
    except BaseException as error:
        if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error)):
            first = (str(error).strip() or "MemoryError").splitlines()[0]
            fail(f"out of memory: {first}; grpo-jax plan says what a config needs", status=1)
        if hosts := _joined_hosts():
            traceback.print_exc()
            hosts.exit_without_barrier(status=1)
        raise


def _parse(argv: list[str]) -> list[str]:
    """Parse flags and the config file they name. What the flag libraries raise becomes one line."""
    # Renamed fields are upgraded before ml_collections sees them: it would call an old name unknown and suggest another.
    argv = ["--allow_config_change=" if each == "--allow_config_change" else each for each in argv]  # of nothing by name
    free, argv = _split_free_fields(argv)
    # ml_collections looks for overrides in sys.argv, whatever is parsed.
    whole, sys.argv = sys.argv, argv
    try:
        rest = flags.FLAGS(_locate_config_file([_upgrade(each) for each in argv]))
        for group, values in free.items():
            if CONFIG.value is not None:
                with CONFIG.value.unlocked():
                    CONFIG.value[group].params.update(values)
    except (AttributeError, KeyError) as error:
        raise UserError(_explain_unknown_field(str(error), argv)) from None
    except (flags.Error, TypeError, ValueError, ImportError) as error:
        last = str(error).strip().splitlines()[-1]  # a config file's own traceback ends with what matters
        raise UserError(last.removeprefix("ValueError: ")) from None
    finally:
        sys.argv = whole
    if len(rest) > 1:
        raise UserError(f"{rest[1]!r}: not a flag; settings are written --config.<field>=<value>")
    return rest


def _split_free_fields(argv: list[str]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Take --config.<group>.params.NAME=value, or .params={"NAME": value}, out of the flags.

    No config lists these names, and ml_collections takes none that it does not know.

    Args:
      argv: the flags.
    Returns: group -> name -> value, and the other flags.
    Raises: UserError if one is not written like this.
    """
    free: dict[str, dict[str, Any]] = {}
    rest = []
    for arg in argv:
        found = FREE_FIELD.match(arg)
        if not found:
            rest.append(arg)
            continue
        group, name, text = found.groups()
        # As in --set of a sweep: text that is no Python value stays text.
        try:
            value = ast.literal_eval(text or "")
        except (ValueError, SyntaxError):
            value = text
        is_number = isinstance(value, int | float) or not name
        if text is None or isinstance(value, dict) == bool(name) or (group == "objective" and not is_number):
            field = f"--config.{group}.params"
            raise UserError(f"{arg}: write {field}.NAME=0.3 or {field}='{{\"NAME\": 0.3}}'")
        named: Any = {name: value} if name else value
        free.setdefault(group, {}).update(named)
    return free, rest


def _upgrade(arg: str) -> str:
    """Return --config.<old name>=value under the field's new name; anything else as it is."""
    if not arg.startswith("--config."):
        return arg
    from grpo_jax.config.aliases import RENAMED, upgrade_setting

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
    return f"{flag}: unknown field; `grpo-jax fields` lists them all"


def _locate_config_file(argv: list[str]) -> list[str]:
    """Return the flags, with the path of the config file that --config=<name> or --config <name> means."""
    located = list(argv)
    for i, arg in enumerate(argv):
        if arg.startswith("--config="):
            name = arg.partition("=")[2]
        elif i and argv[i - 1] == "--config":
            name = arg
        else:
            continue
        path, argument = find_config(name)
        located[i] = arg.removesuffix(name) + ":".join(filter(None, (str(path), argument)))
    return located
