"""Adapts our docstrings to griffe, which reads them for the site."""

import re
import textwrap

import griffe


class Docstrings(griffe.Extension):
    def on_object(self, *, obj, **_):
        if obj.docstring is not None:
            text = obj.docstring.value
            text = re.sub(r"^( *)Example:$", r"\1Examples:", text, flags=re.MULTILINE)
            obj.docstring.value = _plain_references(text)

    def on_package(self, *, pkg, **_):
        """A function that is declared with `arguments_of` another has its arguments."""
        for function in pkg["reference"].functions.values():
            for decorator in function.decorators:
                if decorator.callable_path.endswith(".arguments_of"):
                    other = decorator.value.arguments[0].canonical_path
                    other = pkg[other.removeprefix(f"{pkg.path}.")]
                    function.parameters = other.parameters


def _plain_references(text):
    """Makes the last section a paragraph, which griffe would fold into a box."""
    head, title, references = text.partition("\nReferences:\n")
    if not title:
        return text
    references = textwrap.dedent(references).strip()
    return f"{head}\n**References.**\n\n{references}\n"
