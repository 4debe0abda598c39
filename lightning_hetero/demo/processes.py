"""Starts the demo's processes, and ensures that none of them outlives it."""

import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.environments.lightning import find_free_network_port

from lightning_hetero.demo import competitor

PR_SET_PDEATHSIG = 1  # as the kernel numbers it

Request = Callable[[Any], Any]
"""Sends a request from a rank to the demo's main process, and returns its answer."""


class Interrupted(Exception):  # noqa: N818 - nothing is wrong
    """Ctrl-C. Unlike KeyboardInterrupt it passes through Lightning, which would end the process in its own way."""


@contextmanager
def interruptible() -> Iterator[None]:
    """Inside, Ctrl-C raises `Interrupted`."""

    def interrupt(*_: object) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def end_with_parent(parent: int) -> None:
    """Have this process killed when its parent ends for any reason."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGKILL)

    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before the call above
            watch()
    else:
        threading.Thread(target=watch, daemon=True).start()


@contextmanager
def competing(count: int, core: int) -> Iterator[list[int]]:
    """Run processes that compete for a core; yields their process ids.

    Args:
        count: how many.
        core: which one; below 0 the system chooses.
    """
    command = [sys.executable, "-S", "-E", str(Path(competitor.__file__)), str(os.getpid()), str(core)]
    running = [subprocess.Popen(command, stdin=subprocess.DEVNULL) for _ in range(count)]
    try:
        yield [process.pid for process in running]
    finally:
        for process in running:
            process.kill()
        for process in running:
            process.wait()


def _run_rank(work: Callable[[int, Request], Any], rank: int, parent: int, connection: Connection) -> None:
    end_with_parent(parent)
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0"}

    def request(content: Any) -> Any:
        connection.send(("request", content))
        return connection.recv()

    try:
        result = work(rank, request)
    except BaseException:  # noqa: BLE001 - whatever it is, the main process has to know of it
        connection.send(("failed", traceback.format_exc()))
    else:
        connection.send(("done", result))


def run_ranks(work: Callable[[int, Request], Any], world_size: int, answer: Request, *, spawn: bool) -> list[Any]:
    """Call `work(rank, request)` in one process per rank, and return what each returned.

    Args:
        work: a function that can be pickled.
        world_size: how many ranks.
        answer: called in this process with the content of each request; returns the answer.
        spawn: start new interpreters, as CUDA needs; otherwise processes are forked on Linux, which saves the imports.

    Raises:
        RuntimeError: a rank failed; all others have then been killed.
    """
    context: Any = multiprocessing.get_context("fork" if sys.platform.startswith("linux") and not spawn else "spawn")
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(find_free_network_port())}
    ranks: list[Any] = []
    connections: dict[Connection, int] = {}
    results: dict[int, Any] = {}
    try:
        # A terminal sends Ctrl-C to all processes; it is for this one, which then ends the others.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            ranks.append(context.Process(target=_run_rank, args=(work, rank, os.getpid(), theirs), daemon=True))
            ranks[-1].start()
            theirs.close()
            connections[ours] = rank
        signal.signal(signal.SIGINT, before)
        while connections:
            for connection in wait(list(connections)):
                assert isinstance(connection, Connection)
                kind, content = _receive(connection, connections[connection])
                if kind == "request":
                    connection.send(answer(content))
                else:
                    results[connections.pop(connection)] = content
    finally:
        for process in ranks:
            process.kill()
        for process in ranks:
            process.join()
    return [results[rank] for rank in range(world_size)]


def _receive(connection: Connection, rank: int) -> tuple[str, Any]:
    try:
        kind, content = connection.recv()
    except (EOFError, ConnectionError):
        raise RuntimeError(f"rank {rank} ended without an error message; did something kill it?") from None
    if kind == "failed":
        raise RuntimeError(f"rank {rank} failed:\n{content}")
    return kind, content
