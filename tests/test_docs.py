"""The code of the site and of the README runs, and the reference is complete."""

import contextlib
import io
import pathlib
import re

import jax
import numpy as np
import pytest

import jaxkl

from . import oracle
from .helpers import assert_close


ROOT = pathlib.Path(__file__).parent.parent
README = ROOT / "README.md"
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
READ_IN_PLACE = [README, ROOT / "examples/smollm2/README.md", *PAGES]
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
    for page in PAGES:
        text = page.read_text()
        mark = pytest.mark.torch if "\nimport torch\n" in text else pytest.mark.newest
        if "```python" in text:
            yield pytest.param(page, marks=[pytest.mark.slow, mark])


@pytest.fixture
def as_users_have_it(all_platforms):
    """JAX's defaults, as other tests are stricter, and quick compilation."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
    jax.config.update("jax_disable_most_optimizations", before)


def run(page):
    """Runs the blocks of a page as one program, and returns what it defines.

    What the page asserts must hold, and what it prints must be what it shows.
    """
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
    return names


@pytest.mark.usefixtures("as_users_have_it")
@pytest.mark.parametrize("page", [*programs()], ids=name)
def test_the_code_of_a_page_runs(page):
    assert len(run(page)) > 1


@pytest.mark.usefixtures("as_users_have_it")
def test_the_code_of_the_readme_runs_and_is_right():
    names = run(README)
    hidden, kernel, teacher_hidden, teacher_kernel = (
        np.asarray(names[name], np.float64)
        for name in ("hidden", "kernel", "teacher_hidden", "teacher_kernel")
    )
    logits = hidden @ kernel, teacher_hidden @ teacher_kernel
    found = oracle.distillation_loss(*logits, temperature=2.0)
    np.testing.assert_allclose(names["loss"], found.loss, rtol=1e-5)
    for got, want in (
        (names["gradient"].hidden, found.student @ kernel.T),
        (names["gradient"].kernel, hidden.T @ found.student),
    ):
        assert_close(got, want, 1e-5)


@pytest.mark.parametrize("page", [ROOT / "CONTRIBUTING.md", *PAGES], ids=name)
def test_every_block_has_a_language(page):
    for line, language, _ in blocks(page):
        assert language in LANGUAGES, f"{name(page)}:{line}: {language or 'none'}"


@pytest.mark.parametrize("page", READ_IN_PLACE, ids=name)
def test_links_lead_to_files_of_the_repository(page):
    """These pages are read in place; the site checks its own links."""
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)\s#]+)", prose)
    absent = () if (DOCS / "images").exists() else (".png",)  # from the sdist
    found = [x for x in links if not x.startswith("http") and not x.endswith(absent)]
    assert not [x for x in found if not (page.parent / x).exists()]


def test_a_block_without_a_language_is_seen(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text("```python\n1\n```\n\n- x\n\n  ```\n  y\n  ```\n")
    assert [language for _, language, _ in blocks(page)] == ["python", ""]
    page.write_text("```python\n1\n")
    with pytest.raises(AssertionError, match="page.md:2: a block is not closed"):
        blocks(page)


def public(module):
    """Full names of what a user may call, without modules and other packages."""
    return {
        f"{module.__name__}.{key}"
        for key, value in vars(module).items()
        if not key.startswith("_")
        and callable(value)
        and getattr(value, "__module__", "").startswith("jaxkl")
        and (module is jaxkl or value.__module__ == module.__name__)
    }


def test_the_reference_has_every_public_name_once():
    text = "\n".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    documented = re.findall(r"^::: (jaxkl\.\S+)$", text, re.MULTILINE)
    modules = {"jaxkl.losses", "jaxkl.reference"}
    names = public(jaxkl) | public(jaxkl.losses) | public(jaxkl.reference)
    assert sorted(documented) == sorted(names | modules)
    index = (DOCS / "api" / "index.md").read_text()
    assert not {x for x in names if f"`{x.removeprefix('jaxkl.')}`" not in index}


def test_every_page_is_in_the_navigation():
    config = (ROOT / "mkdocs.yml").read_text()
    pages = re.findall(r"^ +- (?:[^\n:]+: )?(\S+\.md)$", config, re.MULTILINE)
    assert sorted(pages) == sorted(x.relative_to(DOCS).as_posix() for x in PAGES)
