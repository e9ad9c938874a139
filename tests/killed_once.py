"""``mrcnn-edu`` for torchrun, whose second process kills itself in the fourth iteration of its first life."""

from __future__ import annotations

import os
import signal

from mrcnn_edu.cli import main
from mrcnn_edu.models.mask_rcnn import MaskRCNN

losses, calls = MaskRCNN.losses, 0


def deadly(*arguments):
    """The losses; at the fourth call, the end."""
    global calls
    calls += 1
    if calls == 4 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return losses(*arguments)


MaskRCNN.losses = deadly
raise SystemExit(main())
