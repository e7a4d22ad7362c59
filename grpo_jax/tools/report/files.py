"""The files of a report: page, pictures, tables; and the main table inside a README."""

from __future__ import annotations

import pathlib

from grpo_jax.errors import UserError
from grpo_jax.files import write_atomically
from grpo_jax.tools.report import document, figures, hparams, page, tables
from grpo_jax.tools.report.analysis import Study


def write(study: Study, out: pathlib.Path, command: str) -> None:
    """Write all of the report's files.

    Args:
      study: the results.
      out: folder to write to; made if it is absent.
      command: the command line, which report.md tells.
    Raises: UserError if the folder cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out={out}: cannot be written ({error.strerror}); choose another folder") from error
    light, dark = (figures.draw(study, theme) for theme in ("light", "dark"))
    text = document.document(study, light, command)
    texts = {
        "report.md": text,
        "report.html": page.page(text, light, dark),
        "results.csv": tables.results_csv(study),
        "runs.csv": tables.runs_csv(study),
        "results.tex": tables.latex(study),
    }
    # The dark pictures are inside report.html only: report.md is read where the page's colours are not known, and one picture
    # of each name is enough there.
    for name, drawn in light.items():
        (out / name).write_bytes(drawn)
    (out / "paper").mkdir(exist_ok=True)
    for name, drawn in figures.draw_for_papers(study).items():
        (out / "paper" / name).write_bytes(drawn)
    for name, each in texts.items():
        write_atomically(out / name, each)
    hparams.write(study, out / "tensorboard")


def render_readme(readme: pathlib.Path, study: Study) -> str:
    """Return the file's text with the study's main table in it. Raises UserError if it has no place for one."""
    if not readme.is_file():
        raise UserError(f"--readme={readme}: no such file")
    return document.insert_table(readme.read_text(encoding="utf-8"), document.main_table(study), str(readme))
