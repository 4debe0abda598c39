"""What ranks send to each other: the messages of a step, what they must agree on at the start, why one has failed.

May import `planning`, `sampling` and torch; it is the first folder that uses `torch.distributed`.
"""
