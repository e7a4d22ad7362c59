"""Look at a run: grpo-jax show runs/gtpo [runs/grpo ...] [--out=show.html]

Writes one HTML file that needs nothing else: health checks, curves, and the sampled groups with each token coloured by
entropy or advantage. It may be asked for while the run goes on.
"""

from __future__ import annotations

import argparse
import pathlib

from grpo_jax.errors import UserError
from grpo_jax.files import write_atomically
from grpo_jax.tools import cli


def parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    parser = cli.make_parser("show", __doc__)
    parser.add_argument("workdirs", nargs="*", type=pathlib.Path, metavar="workdir", help="folder of a run")
    parser.add_argument("--workdir", action="append", type=pathlib.Path, default=[], help="the same, as a flag")
    parser.add_argument("--out", type=pathlib.Path, help="the file to write; default: show.html in the first folder")
    return parser


def main(args: argparse.Namespace) -> None:
    """Write the page of the runs. Raises UserError."""
    print(f"written: {show([*args.workdirs, *args.workdir], args.out)}")


def show(workdirs: list[pathlib.Path], out: pathlib.Path | None) -> pathlib.Path:
    """Write the page of some runs and return where. Raises UserError."""
    from grpo_jax.tools.show.page import page

    if not workdirs:
        raise UserError("the folder of a run is missing; for example grpo-jax show runs/demo")
    out = out or workdirs[0] / "show.html"
    # The page is made before the file is opened, and the file is replaced at once: a browser that reloads it while the run goes
    # on never sees half a page.
    text = page(workdirs)
    try:
        write_atomically(out, text)
    except OSError as error:
        raise UserError(f"--out={out}: cannot be written ({error.strerror}); choose another file") from error
    return out


def command() -> None:
    """Run from the command line."""
    cli.run(main, parser())
