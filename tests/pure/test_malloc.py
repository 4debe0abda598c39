"""The allocator keeps what is freed: seen from outside, by the pages that the kernel has to bring in again."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
import torch
from lightning_hetero.malloc import keep_freed_memory
taken = keep_freed_memory() if sys.argv[1] == "kept" else True
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    torch.ones(48 * 2**20 // 4)
before = faults()
for _ in range(10):
    torch.ones(48 * 2**20 // 4)
print(taken, faults() - before)
"""


def run(setting: str) -> tuple[bool, int]:
    out = subprocess.run(
        [sys.executable, "-c", SCRIPT, setting], capture_output=True, text=True, check=True, timeout=120
    ).stdout.split()
    return out[0] == "True", int(out[1])


@pytest.mark.skipif(
    "CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="the C library is not glibc: nothing is set there"
)
def test_freed_memory_is_used_again() -> None:
    """480 MiB in blocks of 48: fresh pages each time as it is, hardly any once it is told to keep them."""
    _, fresh = run("default")
    taken, again = run("kept")
    assert taken
    assert again < fresh / 20
