"""Adds the programs of examples/, their guide and the notebook to the site.

Pages link to them as in the repository, `../examples/digits.py`. This hook makes the
links lead to the site's pages.
"""

import base64
import json
import re
from pathlib import Path

from markdown.extensions.toc import slugify
from mkdocs.structure.files import File, InclusionLevel


EXAMPLES = Path(__file__).parents[2] / "examples"
LINK = re.compile(r"\]\(\.\./(examples/[\w/]+)\.(?:py|ipynb|md)\)")
WIDE = 800  # pixels: wider pictures have several panels side by side
JUPYTER_ANCHOR = re.compile(r"\]\(#([^)]+)\)")


def on_files(files, config):
    shown = {"smollm2/README": _guide, "distillation": _notebook}
    shown |= {x.stem: _program for x in EXAMPLES.glob("*.py")}
    for name, page in shown.items():
        # The page of examples links to these pages; the navigation does not.
        options = dict(content=page(name), inclusion=InclusionLevel.NOT_IN_NAV)
        files.append(File.generated(config, f"examples/{name}.md", **options))


def on_page_markdown(markdown, **_):
    return LINK.sub(r"](\1.md)", markdown)


def _program(name):
    path = EXAMPLES / f"{name}.py"
    unsearched = "---\nsearch:\n  exclude: true\n---\n"
    text = _fenced("python", path.read_text())
    return f"{unsearched}# examples/{path.name}\n\n{text}"


def _guide(name):
    return (EXAMPLES / f"{name}.md").read_text().replace("../../docs/", "../../")


def _notebook(name):
    notebook = json.loads((EXAMPLES / f"{name}.ipynb").read_text())
    return "\n\n".join(part for cell in notebook["cells"] for part in _cell(cell))


def _cell(cell):
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        yield JUPYTER_ANCHOR.sub(_anchor, source)
        return
    yield _fenced("python", source)
    for output in cell["outputs"]:
        if output["output_type"] == "stream":
            yield _fenced("text", "".join(output["text"]))
        else:
            png = "".join(output["data"]["image/png"]).replace("\n", "")
            width = int.from_bytes(base64.b64decode(png)[16:20])
            style = "{ .wide }" if width > WIDE else ""
            yield f"![What this cell draws](data:image/png;base64,{png}){style}"


def _anchor(match):
    """Jupyter replaces the spaces of a heading by hyphens and keeps the rest."""
    return f"](#{slugify(match[1].replace('-', ' '), '-')})"


def _fenced(language, text):
    return f"````{language}\n{text.rstrip()}\n````"
