"""``python -m mrcnn_edu`` is the ``mrcnn-edu`` command."""

from mrcnn_edu.cli import main

raise SystemExit(main())
