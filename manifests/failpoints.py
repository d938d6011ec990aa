"""Failpoints: named places of the commit protocols where a test can have the process die.

KDPIPE_FAILPOINT=NAME dies by SIGKILL the first time that place is reached, NAME#3 the third time. Cost: a comparison.
"""

import os
import signal

_name, _left = "", 1


def arm(place: str) -> None:
    """Die at this place; "" nowhere."""
    global _name, _left
    _name, _, count = place.partition("#")
    _left = int(count or 1)


def failpoint(name: str) -> None:
    """Die here if this place and time was asked for."""
    global _left
    if name == _name:
        _left -= 1
        if _left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


arm(os.environ.get("KDPIPE_FAILPOINT", ""))
