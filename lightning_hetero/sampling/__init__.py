"""Which samples each rank computes: the global batches that the user's sampler draws, and a rank's part of each.

May import `planning`, torch, and Lightning's functions that read and set random states; it does not communicate with
other processes.
"""
