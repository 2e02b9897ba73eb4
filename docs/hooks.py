"""What the build of the docs does beside mkdocs: docstrings' reStructuredText roles, and formulas without a script."""

from __future__ import annotations

import html
import re
from typing import Any

from griffe import Extension, Object
from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

_MATH_BLOCK = re.compile(r"^( *)\.\. math::(.*(?:\n(?:\1 +.*)?$)*)", re.MULTILINE)
_LINK = re.compile(r":(?:class|func|meth|mod|attr|data):`~?([\w.]+)`")
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[([](.*?)\\[)\]]</\1>', re.DOTALL)


def in_markdown(docstring: str) -> str:
    """A docstring with Markdown in place of the roles of reStructuredText."""
    docstring = _MATH_BLOCK.sub(lambda found: f"{found[1]}$${' '.join(found[2].split())}$$\n", docstring)
    docstring = re.sub(r":math:`(.+?)`", lambda found: f"${' '.join(found[1].split())}$", docstring, flags=re.DOTALL)
    docstring = _LINK.sub(lambda found: f"`{found[1].removeprefix('lightning_gradhist.')}`", docstring)
    docstring = re.sub(r"^Example:$", "Examples:", docstring, flags=re.MULTILINE)  # which griffe knows
    return re.sub(r"::\n\n", ":\n\n", docstring).replace("``", "`")


class Roles(Extension):
    """Rewrites each docstring before it is read."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Called by griffe for each module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = in_markdown(obj.docstring.value)


def on_files(files: Files, *, config: Any, **kwargs: Any) -> None:
    """The README's picture is shown here, too."""
    files.append(File.generated(config, "pictures/readme.png", abs_src_path="examples/readme.png"))


def on_page_content(content: str, **kwargs: Any) -> str:
    """Formulas as MathML, which browsers show by themselves, and long names of tests in words that may be broken."""
    content = re.sub(r"<code>test_\w+</code>", lambda found: found[0].replace("_", "_<wbr>"), content)
    return _FORMULA.sub(
        lambda found: convert(html.unescape(found[2]), display="block" if found[1] == "div" else "inline"), content
    )
