"""What the book needs of Sphinx beyond Jupyter Book: kernels that know they run for a page, pages that ask nobody for
scripts, and docstrings of the library's own style on the API pages."""

from __future__ import annotations

import os
import re
from typing import Any

# The kernels that execute the chapters inherit it; see mrcnn_edu.notebook.
os.environ["MRCNN_EDU_BOOK"] = "1"

ENTRY = re.compile(r"^(?P<name>\S+(?:, \S+)*) {2,}(?P<text>\S.*)$")


def drop_remote_scripts(app: Any, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """Thebe's scripts come from elsewhere and fail on a page opened from disk; the book has launch buttons instead."""
    scripts = context.get("script_files", [])
    context["script_files"] = [script for script in scripts if "thebe" not in str(getattr(script, "filename", script))]


def list_entries(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Turn the blocks of ``name  description`` that docstrings here use into field lists.

    A continuation line is indented deeper than its entry.
    """
    rewritten: list[str] = []
    in_entries = False
    for line in lines:
        entry = ENTRY.match(line)
        if entry and (in_entries or not rewritten or not rewritten[-1].strip()):
            rewritten.append(f":{entry['name'].replace(':', '')}: {entry['text'].strip()}")
            in_entries = True
        elif in_entries and line.startswith(" "):
            rewritten.append("    " + line.strip())
        else:
            if in_entries and line.strip():
                rewritten.append("")
            in_entries = in_entries and not line.strip() and False
            rewritten.append(line)
    lines[:] = rewritten


def setup(app: Any) -> dict[str, bool]:
    app.connect("html-page-context", drop_remote_scripts, priority=999)
    app.connect("autodoc-process-docstring", list_entries)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
