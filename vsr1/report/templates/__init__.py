"""Fill the jinja2 templates of this folder: pages, cards, tables and the generated part of README.md."""

import html
import re
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

PAGES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=lambda name: name.endswith(".html"),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
PAGES.filters["code"] = lambda text: Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text)))


def tex(text: str) -> str:
    """Return a text with LaTeX's own characters made harmless."""
    marks = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    marks |= {"±": r"$\pm$", "—": "---", "†": r"$\dagger$", "‡": r"$\ddagger$"}
    return "".join(marks.get(c, "\\" + c if c in "&%$#_{}" else c) for c in text)


PAGES.filters["tex"] = tex


def render(template: str, **values) -> str:
    """Return a template filled with values; in pages every text is escaped."""
    return PAGES.get_template(template).render(values)
