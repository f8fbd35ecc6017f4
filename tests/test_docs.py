"""The code of the site and of the README runs, and the reference leaves nothing out."""

import contextlib
import importlib.util
import io
import pathlib
import re

import jax
import pytest

import jaxkl


ROOT = pathlib.Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
FENCE = re.compile(r"^( *)(`{3,}|~{3,})(.*)$")
LANGUAGES = {"python", "bash", "console", "text"}


def name(page):
    return page.relative_to(ROOT).as_posix()


def blocks(page):
    """The fenced blocks of a page: first line, language, text."""
    found, opened = [], None
    for number, line in enumerate(page.read_text().splitlines(), 1):
        fence = FENCE.match(line)
        if opened is None and fence:
            opened = fence[2], number + 1, fence[3].strip(), []
        elif opened and fence and fence[2] == opened[0] and not fence[3].strip():
            found.append((opened[1], opened[2], "\n".join(opened[3]) + "\n"))
            opened = None
        elif opened:
            opened[3].append(line)
    assert opened is None, f"{name(page)}:{opened[1]}: a block is not closed"
    return found


def programs():
    with_code = [ROOT / "README.md", *PAGES]
    return [page for page in with_code if "```python" in page.read_text()]


@pytest.fixture
def as_users_have_it():
    """JAX's defaults, where the rest of the tests is stricter; compiled in less time."""
    jax.config.update("jax_disable_most_optimizations", True)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.usefixtures("as_users_have_it")
@pytest.mark.parametrize("page", programs(), ids=name)
def test_the_code_runs(page):
    """In order, as one program; what it asserts holds, and what it prints is shown."""
    names = {"__name__": "page"}
    printed = None
    for line, language, text in blocks(page):
        if language == "python":
            code = compile("\n" * (line - 1) + text, str(page), "exec")
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(code, names)
            printed = out.getvalue()
        elif language == "text":
            assert printed == text, f"{name(page)}:{line}: other output"
            printed = None
