"""What griffe, which reads the docstrings, has to be told about ours."""

import re
import textwrap

import griffe


class Docstrings(griffe.Extension):
    def on_package(self, *, pkg, loader, **_):
        shown = pkg["_problem.prepare"].parameters
        for module in (pkg["_distillation"], pkg["reference"]):
            for function in module.functions.values():
                decorators = [str(x.value) for x in function.decorators]
                if "public_signature" in decorators and "**options:" not in (
                    function.docstring.value
                ):
                    _merge(function, shown)

    def on_object(self, *, obj, **_):
        if obj.docstring is not None:
            text = obj.docstring.value
            text = re.sub(r"^( *)Example:$", r"\1Examples:", text, flags=re.MULTILINE)
            obj.docstring.value = _plain_references(text)


def _merge(function, shown):
    """As `public_signature` does at run time: the keyword arguments of `prepare`."""
    own = [x for x in function.parameters if x.name != "options"]
    hidden = {"statistics", *(x.name for x in own)}
    more = [x for x in shown if x.name not in hidden]
    function.parameters = griffe.Parameters(*own, *more)


def _plain_references(text):
    """The last section as a paragraph: griffe would fold it into a box."""
    head, title, references = text.partition("\nReferences:\n")
    if not title:
        return text
    references = textwrap.dedent(references).strip()
    return f"{head}\n**References.**\n\n{references}\n"
