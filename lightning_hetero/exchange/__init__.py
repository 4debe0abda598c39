"""What ranks send to each other: messages, what they must agree on, where they wait, why one has failed.

May import `planning`, `sampling` and torch; it is the first folder that uses `torch.distributed`.
"""
