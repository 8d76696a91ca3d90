"""An extension of griffe: docstrings are plain text with code in backticks, not Markdown.

Formulas in them have brackets, stars and underscores, which Markdown would take for links and emphasis.
"""

import re

import griffe


class PlainDocstrings(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        if obj.docstring is not None:
            obj.docstring.value = escaped(obj.docstring.value)


def escaped(docstring: str) -> str:
    lines = []
    for line in docstring.splitlines():
        if line.startswith(">>>"):  # an indented block, which is code
            lines += ["", f"    {line}", ""]
            continue
        names, text = re.fullmatch(r"(\s+[\w, ]+:(?=\s)|)(.*)", line).groups()  # of arguments, for griffe to read
        pieces = text.split("`")
        pieces[::2] = [re.sub(r"([\[\]*_<])", r"\\\1", piece) for piece in pieces[::2]]
        lines.append(names + "`".join(pieces))
    return "\n".join(lines)
