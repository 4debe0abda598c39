"""How fast a device is before anything of the user's has run on it: only enough to guess a first split by.

Where devices are very unequal, each step of an equal split takes as long as several of the best one do, and loaders
with workers may have drawn a dozen of them before the first measurement.
"""

from time import perf_counter

import torch
from torch.nn.functional import conv2d

_CHANNELS, _PIXELS = 64, 64

# Enough images at once to fill the device.
_IMAGES = {"cuda": 64}

_SECONDS = 0.1
"""Longer than the period after which a throttled CPU gets its time anew (100 ms by default, on Linux)."""


def speed(device: torch.device) -> float:
    """Images a second that a device convolves, 64 x 64 pixels of 64 channels.

    Takes a tenth of a second and the device's first convolution. Nothing random is drawn.
    """
    images = _IMAGES.get(device.type, 1)
    x = torch.ones(images, _CHANNELS, _PIXELS, _PIXELS, device=device)
    kernel = torch.ones(_CHANNELS, _CHANNELS, 3, 3, device=device)
    with torch.inference_mode():
        _convolve(x, kernel)
        done, begin = 0, perf_counter()
        while (passed := perf_counter() - begin) < _SECONDS:
            _convolve(x, kernel)
            done += images
    return done / passed


def _convolve(x: torch.Tensor, kernel: torch.Tensor) -> None:
    conv2d(x, kernel, padding=1)
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
