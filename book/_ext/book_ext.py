"""What the book needs of Sphinx beyond Jupyter Book: kernels that know they run for a page, pages that ask nobody for
scripts, and docstrings of the library's own style on the API pages."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.util.docutils import SphinxRole

# The kernels that execute the chapters inherit it; see mrcnn_edu.notebook.
os.environ["MRCNN_EDU_BOOK"] = "1"

ENTRY = re.compile(r"^(?P<name>\S+(?:, \S+)*) {2,}(?P<text>\S.*)$")

NARROW = re.compile(r"^(?P<name>\S+(?:, \S+)*) +(?P<text>\S.*)$")  # the longest name of a block may leave one space


class Chapter(SphinxRole):
    """``{chapter}`5``` is a link called "Chapter 5", or just that text while the chapter is not written."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        text = f"Chapter {int(self.text)}"
        files = list(Path(self.env.srcdir).glob(f"book/chapters/{int(self.text):02d}_*.ipynb"))
        if not files:
            return [nodes.inline(text, text)], []
        target = f"/book/chapters/{files[0].stem}"
        link = pending_xref("", refdomain="std", reftype="doc", reftarget=target, refexplicit=True, refwarn=True)
        link["refdoc"] = self.env.docname
        link += nodes.inline(text, text, classes=["xref", "std", "std-doc"])
        return [link], []


def drop_remote_scripts(app: Any, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """Thebe's scripts come from elsewhere and fail on a page opened from disk; there are launch buttons instead."""
    context["script_files"] = [
        script for script in context.get("script_files", []) if "thebe" not in _described(script)
    ]


def _described(script: Any) -> str:
    """Where a script comes from, or its text."""
    return f"{getattr(script, 'filename', script)} {getattr(script, 'attributes', '')}".lower()


def list_entries(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Turn the blocks of ``name  description`` that docstrings here use into field lists.

    A continuation line is indented deeper than its entry.
    """
    rewritten: list[str] = []
    in_entries = False
    for line in lines:
        entry = (NARROW if in_entries else ENTRY).match(line)
        if entry and (in_entries or not rewritten or not rewritten[-1].strip()):
            rewritten.append(f":{entry['name'].replace(':', '')}: {entry['text'].strip()}")
            in_entries = True
        elif in_entries and line.startswith(" "):
            rewritten.append("    " + line.strip())
        else:
            if in_entries and line.strip():
                rewritten.append("")
            in_entries = False
            rewritten.append(line)
    lines[:] = rewritten


def setup(app: Any) -> dict[str, bool]:
    app.add_role("chapter", Chapter())
    app.connect("html-page-context", drop_remote_scripts, priority=999)
    app.connect("autodoc-process-docstring", list_entries)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
