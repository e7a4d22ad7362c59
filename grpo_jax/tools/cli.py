"""Common to the commands: flags, --help, and errors as one line with exit status 2.

Imported by every command before it knows what it is asked for, so jax and what imports it wait until they are needed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import pathlib
import re
import sys
import textwrap
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from absl import app, flags, logging
from ml_collections import config_flags

from grpo_jax.errors import UserError

if TYPE_CHECKING:
    from grpo_jax.config import Config

EXIT_BAD_INPUT = 2
HUGE_PAGES = "glibc.malloc.hugetlb=1"  # as GLIBC_TUNABLES when a process starts: a compiled call faults its memory in anew
SHIPPED = pathlib.Path(__file__).parent.parent / "configs"
CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "a shipped config by its name (dapo:tiny, gspo:llm) or a path (my/dapo.py:tiny), scale after the colon; "
    "--config.<field>=<value> overrides a field, `grpo-jax fields` lists them",
)
WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run: checkpoints, metrics, completions, pictures")
STEP_HELP = "checkpoint to take; default: the newest"


def run(main: Callable[..., Any], parser: argparse.ArgumentParser | None = None) -> None:
    """Parse the command line and call `main`; bad input ends with one line on stderr and status 2.

    parser: for a command without a config; `main` gets what it parsed. None: absl's flags, those above and the command's.
    """
    logging.set_verbosity(logging.ERROR)  # Orbax reports every file, and warns that it only reads where it only reads
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


def choose_step(workdir: pathlib.Path, step: int | None) -> int:
    """Return `step` if the workdir has that checkpoint; None: the newest. Raises UserError if there is none or not that one."""
    from grpo_jax.training.checkpoint import saved_steps

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


def fail(message: str) -> None:
    """Write one line on stderr and end the process with status 2."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    # An ordinary exit of one of several processes waits for the others, which wait for it in a collective call.
    if hosts := _joined_hosts():
        hosts.exit_without_barrier(EXIT_BAD_INPUT)
    sys.exit(EXIT_BAD_INPUT)


def _joined_hosts() -> Any:
    """Return grpo_jax.parallel.hosts in a process that is one of several, else None."""
    hosts = sys.modules.get("grpo_jax.parallel.hosts")  # not imported yet: this process has joined nobody
    return hosts if hosts and hosts.is_joined() else None


def _call(main: Callable[[], Any]) -> None:
    """Call `main`, so that an error of one process ends it at once also where others run beside it."""
    try:
        main()
    except UserError as error:
        fail(str(error))
    except BaseException:
        if hosts := _joined_hosts():
            traceback.print_exc()
            hosts.exit_without_barrier(status=1)
        raise


def _parse(argv: list[str]) -> list[str]:
    """Parse flags and the config file they name. What the flag libraries raise becomes one line."""
    # Renamed fields are upgraded before ml_collections sees them: it would call an old name unknown and suggest another.
    params, argv = _split_params(argv)
    # ml_collections looks for overrides in sys.argv, whatever is parsed.
    whole, sys.argv = sys.argv, argv
    try:
        rest = flags.FLAGS(_locate_config_file([_upgrade(each) for each in argv]))
        if params and CONFIG.value is not None:
            with CONFIG.value.objective.params.unlocked():
                CONFIG.value.objective.params.update(params)
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


def _split_params(argv: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Take --config.objective.params.NAME=number, or .params={"NAME": number}, out of the flags. Raises UserError.

    No config lists these names, and ml_collections takes none that it does not know.
    """
    field = "--config.objective.params"
    own = [arg for arg in argv if re.match(rf"{re.escape(field)}[.=]", arg)]
    params: dict[str, Any] = {}
    for arg in own:
        name, equals, text = arg.removeprefix(field).partition("=")
        try:
            value = json.loads(text)
        except ValueError:
            value = None
        if not equals or (isinstance(value, dict) == bool(name)) or value is None:
            raise UserError(f"{arg}: write {field}.NAME=0.3 or {field}='{{\"NAME\": 0.3}}'")
        params |= {name[1:]: value} if name else value
    return params, [arg for arg in argv if arg not in own]


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
