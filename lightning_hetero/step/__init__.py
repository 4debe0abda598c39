"""One training step of a rank: loss counts and weights, gradients, BatchNorm, buffers, running out of memory.

May import the folders before it, torch and torchmetrics; it knows nothing of Lightning.
"""
