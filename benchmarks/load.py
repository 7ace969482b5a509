"""Other work for the cores, while something is measured beside it."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

SECONDS = 120
"""After which the load ends by itself, should nobody end it: longer than any trial."""
BURN = """
import os, sys, time
parent, end = int(sys.argv[1]), time.monotonic() + float(sys.argv[2])
while time.monotonic() < end and os.getppid() == parent:
    for _ in range(100_000):
        pass
"""


@contextmanager
def loaded(processes: int) -> Iterator[list["subprocess.Popen[bytes]"]]:
    """Inside, so many processes only count. They end with the block, with this process, and after SECONDS."""
    code = [sys.executable, "-c", BURN, str(os.getpid()), str(SECONDS)]
    children = []
    try:
        for _ in range(processes):
            children.append(subprocess.Popen(code))
        yield children
    finally:
        for child in children:
            child.kill()
        for child in children:
            child.wait()
