"""Fill the jinja2 templates of this folder: pages, cards and the generated part of README.md."""

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


def render(template: str, **values) -> str:
    """Return a template filled with values; in pages every text is escaped."""
    return PAGES.get_template(template).render(values)
