"""One training step of a rank: loss counts and weights, what trains, gradients, buffers, running out of memory.

May import `planning`, `sampling`, `exchange`, `device`, torch and torchmetrics, but not Lightning.
"""
