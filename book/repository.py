"""Write the repository's address, which stands in _config.yml, into the one cell of each chapter that needs it.

python book/repository.py          # after changing repository.url
python book/repository.py --check  # say which chapters have another address
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent

# %pip keeps what Colab has where it fits: the library's requirements are lower bounds.
BOOTSTRAP = """\
# On Colab this installs the library beside Colab's own PyTorch. Anywhere else it does nothing.
from importlib.util import find_spec

if find_spec("mrcnn_edu") is None:
    %pip install --quiet "mrcnn_edu @ git+{url}\""""


def bootstrap() -> str:
    """The cell that makes a chapter run on Colab."""
    return BOOTSTRAP.format(url=yaml.safe_load((ROOT / "_config.yml").read_text())["repository"]["url"])


def main() -> int:
    stale = []
    for path in sorted((ROOT / "book/chapters").glob("*.ipynb")):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        for cell in notebook["cells"]:
            if "bootstrap" in cell["metadata"].get("tags", []) and "".join(cell["source"]) != bootstrap():
                cell["source"] = bootstrap().splitlines(keepends=True)
                stale.append(path)
        if path in stale and "--check" not in sys.argv:
            path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(*(f"{path.name} " + ("differs" if "--check" in sys.argv else "rewritten") for path in stale), sep="\n")
    return 1 if stale and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
