"""What ranks say to each other: messages of a step, agreement at the start, and why a rank has failed.

May import `planning`, `sampling` and torch, and is the first floor that uses `torch.distributed`.
"""
