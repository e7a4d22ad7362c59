"""The report as one HTML file that needs nothing else, with its pictures inside, drawn once for light and once for dark."""

from __future__ import annotations

import base64
import importlib.resources
import re
import string
from collections.abc import Mapping


def page(text: str, light: Mapping[str, bytes], dark: Mapping[str, bytes]) -> str:
    """Turn the report into HTML.

    Args:
      text: the report in Markdown.
      light, dark: file name -> PNG of each picture that the text names, for light and dark pages.
    Returns: the page, with style and pictures inside.
    """
    from markdown_it import MarkdownIt

    # No HTML in the Markdown: names of settings and folders are in it, and must not become elements of the page.
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    # A table wider than the window scrolls in a box of its own, not the whole page.
    body = body.replace("<table>", '<div class="table"><table>').replace("</table>", "</table></div>")
    body = re.sub(
        r'<img src="([^"]+)"( alt="[^"]*") />', lambda found: picture(found[2], light[found[1]], dark[found[1]]), body
    )
    files = importlib.resources.files("grpo_jax.tools.report")
    template = string.Template(files.joinpath("page.html").read_text(encoding="utf-8"))
    return template.substitute(style=files.joinpath("page.css").read_text(encoding="utf-8"), body=body)


def picture(alt: str, light: bytes, dark: bytes) -> str:
    """Write the element of one picture.

    Args:
      alt: its alt attribute, with a space in front.
      light, dark: PNG.
    Returns: HTML in which the browser chooses by its colour scheme.
    """
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{data_url(dark)}">'
        f'<img src="{data_url(light)}"{alt}></picture>'
    )


def data_url(png: bytes) -> str:
    """Return a URL that carries the picture itself."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
