"""The speed of a CPU rank before any of the user's code has run on it, just accurate enough for a first split.

If ranks are very unequal, a step with an equal split takes as long as several steps with the best one, and loaders with
workers may have drawn a dozen batches before the first measurement.
"""

from time import perf_counter

import torch
from torch.nn.functional import conv2d

SECONDS = 0.1
"""Duration of the test: the default period after which Linux renews the CPU quota of a throttled process."""


def speed() -> float:
    """Images of 64 x 64 pixels and 64 channels that this process convolves per second.

    Takes `SECONDS` and the process's first convolution. Draws no random numbers.
    """
    image, kernel = torch.ones(1, 64, 64, 64), torch.ones(64, 64, 3, 3)
    with torch.inference_mode():
        conv2d(image, kernel, padding=1)  # the first call initializes
        images, begin = 0, perf_counter()
        while (seconds := perf_counter() - begin) < SECONDS:
            conv2d(image, kernel, padding=1)
            images += 1
    return images / seconds
