"""What the programs share: flags, and errors as one line with exit status 2."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from grpo_jax.config import Config
from grpo_jax.errors import UserError

EXIT_BAD_INPUT = 2
CONFIG = config_flags.DEFINE_config_file(
    "config", None, "configs/<variant>.py[:scale], e.g. configs/dapo.py:tiny; --config.<field>=... overrides a field"
)
WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run: checkpoints, metrics, completions, pictures")


def run(main: Callable[[], Any]) -> None:
    """Parse flags and call `main`; bad input ends with one line on stderr and status 2."""
    logging.set_verbosity(logging.WARNING)  # Orbax reports every file at INFO
    try:
        app.run(lambda _: _guarded(main), flags_parser=_parse)
    except UserError as error:
        fail(str(error))


def config_from_flags() -> Config:
    """The validated config of --config and its overrides. Raises UserError."""
    if CONFIG.value is None:
        raise UserError("--config is missing; for example --config=configs/dapo.py:tiny")
    return Config.from_config_dict(CONFIG.value)


def fail(message: str) -> None:
    """One line, then out."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(EXIT_BAD_INPUT)


def _guarded(main: Callable[[], Any]) -> None:
    try:
        main()
    except UserError as error:
        fail(str(error))


def _parse(argv: list[str]) -> list[str]:
    """Flags and the config file they name. What the config library raises is turned into one line."""
    try:
        rest = flags.FLAGS(argv)
        _ = CONFIG.value  # a config file is only loaded when it is read
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError, ImportError) as error:
        raise UserError(_explain(error, argv)) from None
    if len(rest) > 1:
        raise UserError(f"{rest[1]!r}: not a flag; settings are written --config.<field>=<value>")
    return rest


def _explain(error: Exception, argv: list[str]) -> str:
    text = str(error.args[0] if error.args else error).strip()
    chosen = next((arg.split("=", 1)[1] for arg in argv if arg.startswith("--config=")), None)
    if isinstance(error, OSError) and chosen:
        known = sorted(
            name for name in os.listdir("configs") if name.endswith(".py") and name not in ("base.py", "__init__.py")
        )
        return f"--config={chosen}: no such file; known variants: {', '.join('configs/' + name for name in known)}"
    return text
