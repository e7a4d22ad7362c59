"""report.md -> one HTML file that needs nothing else, with its pictures inside, drawn once for light and once for dark."""

from __future__ import annotations

import base64
import importlib.resources
import re
import string
from collections.abc import Mapping


def page(text: str, light: Mapping[str, bytes], dark: Mapping[str, bytes]) -> str:
    """text: the report in Markdown. light, dark: the PNG of each picture it names."""
    from markdown_it import MarkdownIt

    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    body = body.replace("<table>", '<div class="table"><table>').replace("</table>", "</table></div>")
    body = re.sub(
        r'<img src="([^"]+)"( alt="[^"]*") />', lambda found: picture(found[2], light[found[1]], dark[found[1]]), body
    )
    files = importlib.resources.files("grpo_jax.tools.report")
    template = string.Template(files.joinpath("page.html").read_text(encoding="utf-8"))
    return template.substitute(style=files.joinpath("page.css").read_text(encoding="utf-8"), body=body)


def picture(alt: str, light: bytes, dark: bytes) -> str:
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{data_url(dark)}">'
        f'<img src="{data_url(light)}"{alt}></picture>'
    )


def data_url(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
