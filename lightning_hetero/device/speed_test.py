"""How fast a CPU rank is before anything of the user's has run on it: only enough to guess a first split by.

Where ranks are very unequal, each step of an equal split takes as long as several of the best one do, and loaders with
workers may have drawn a dozen of them before the first measurement.
"""

from time import perf_counter

import torch
from torch.nn.functional import conv2d

_SECONDS = 0.1
"""The period after which a throttled CPU gets its time anew, on Linux by default."""


def speed() -> float:
    """Images a second that this process convolves, 64 x 64 pixels of 64 channels.

    Takes a tenth of a second and the process's first convolution. Nothing random is drawn.
    """
    image, kernel = torch.ones(1, 64, 64, 64), torch.ones(64, 64, 3, 3)
    with torch.inference_mode():
        _convolve(image, kernel)
        done, begin = 0, perf_counter()
        while (passed := perf_counter() - begin) < _SECONDS:
            _convolve(image, kernel)
            done += 1
    return done / passed


def _convolve(image: torch.Tensor, kernel: torch.Tensor) -> None:
    conv2d(image, kernel, padding=1)
