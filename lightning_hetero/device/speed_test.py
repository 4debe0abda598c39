"""How fast a CPU rank is before any of the user's code has run on it: just enough to guess a first split from.

Where ranks are very unequal, a step of an equal split takes as long as several steps of the best one, and loaders with
workers may have drawn a dozen batches before the first measurement.
"""

from time import perf_counter

import torch
from torch.nn.functional import conv2d

SECONDS = 0.1
"""How long it takes: Linux gives a throttled CPU its time anew after each such period, by default."""


def speed() -> float:
    """Images a second that this process convolves, 64 x 64 pixels of 64 channels.

    Takes `SECONDS` and the process's first convolution. Draws no random numbers.
    """
    image, kernel = torch.ones(1, 64, 64, 64), torch.ones(64, 64, 3, 3)
    with torch.inference_mode():
        conv2d(image, kernel, padding=1)  # the first one sets things up
        images, begin = 0, perf_counter()
        while (seconds := perf_counter() - begin) < SECONDS:
            conv2d(image, kernel, padding=1)
            images += 1
    return images / seconds
