"""Adds MathML, and links from names to the reference, to each page.

Formulas become MathML, so that a page needs no script and no network to show them. A
name such as `jaxkl.kl_div` in code becomes a link to its documentation. It is an error
if there is no such name.
"""

import html
import re

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError

import jaxkl


ARITHMATEX = re.compile(
    r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL
)
CODE = re.compile(
    r"(<a\b[^>]*>.*?</a>|<pre\b.*?</pre>|<h[1-6]\b.*?</h[1-6]>)|<code>([\w.]+)</code>",
    re.DOTALL,
)
MODULES = {"jaxkl": jaxkl, "losses": jaxkl.losses, "reference": jaxkl.reference}


def public_names(module):
    """Returns what a user may call: public re-exports, without modules."""
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and getattr(value, "__module__", "").startswith("jaxkl")
        and callable(value)
    ]


def on_page_content(content, page, **_):
    content = ARITHMATEX.sub(_mathml, content)
    return CODE.sub(lambda match: _linked(match, page), content)


def _mathml(match):
    tag, bracket, latex = match.groups()
    block = bracket == "["
    math = convert(html.unescape(latex.strip()), display="block" if block else "inline")
    return f'<div class="math">{math}</div>' if block else math


def _linked(match, page):
    kept, name = match.groups()
    if kept is not None:
        return kept
    path = _path(name, page)
    if path is None:
        return match[0]
    return f'<autoref identifier="{path}"><code>{name}</code></autoref>'


def _path(name, page):
    """Returns the full name that is documented, or None if it is not ours."""
    module, dot, last = name.rpartition(".")
    module = module.removeprefix("jaxkl.")
    if not dot:
        # A short name is the package's, except on the pages of its modules.
        return f"jaxkl.{name}" if name in PUBLIC["jaxkl"] and _is_plain(page) else None
    if module not in MODULES or not (module == "jaxkl" or last in PUBLIC[module]):
        return None
    if module == "jaxkl":
        if last in PUBLIC["jaxkl"]:
            return f"jaxkl.{last}"
        if not hasattr(jaxkl, last):
            raise PluginError(f"{page.file.src_uri}: there is no `{name}`.")
        return None
    return f"jaxkl.{module}.{last}"


def _is_plain(page):
    return page.file.src_uri not in {"api/losses.md", "api/reference.md"}


PUBLIC = {name: public_names(module) for name, module in MODULES.items()}
