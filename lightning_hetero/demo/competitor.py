"""A process that keeps a CPU core busy, like a colleague's job, while one rank of the demo trains on that core.

Run as a file, so that it imports nothing: `python competitor.py PARENT CORE`. It ends when its parent ends.
"""

import os
import signal
import sys


def compete(parent: int, core: int) -> None:
    """Count on one core for as long as the process `parent` lives.

    Args:
        parent: the process that started this one.
        core: which core to run on; below 0 the system chooses.
    """
    if core >= 0:
        os.sched_setaffinity(0, {core})
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the demo, which then ends this process
    while os.getppid() == parent:
        sum(range(100_000))  # about a millisecond


if __name__ == "__main__":
    compete(int(sys.argv[1]), int(sys.argv[2]))
