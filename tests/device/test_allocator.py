"""The allocator keeps freed memory: measured from outside, by page faults."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import resource, runpy, sys
import numpy
taken = runpy.run_path(sys.argv[2])["keep_freed_memory"]() if sys.argv[1] == "kept" else True
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    numpy.ones(48 * 2**20 // 8)
before = faults()
for _ in range(10):
    numpy.ones(48 * 2**20 // 8)
print(taken, faults() - before)
"""


MODULE = Path(__file__).parents[2] / "lightning_hetero" / "device" / "allocator.py"


def run(setting: str) -> tuple[bool, int]:
    out = subprocess.run(
        [sys.executable, "-c", SCRIPT, setting, MODULE], capture_output=True, text=True, check=True, timeout=120
    ).stdout.split()
    return out[0] == "True", int(out[1])


@pytest.mark.skipif(
    "CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="the C library is not glibc: nothing is set there"
)
def test_freed_memory_is_used_again() -> None:
    """480 MiB in blocks of 48: by default fresh pages each time, hardly any once the allocator keeps them."""
    _, fresh = run("default")
    taken, again = run("kept")
    assert taken
    assert again < fresh / 20
