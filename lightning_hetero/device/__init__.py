"""What a rank measures and sets on its own device: compute time, memory, speed, the CPU's allocator.

May import torch; it does not communicate with other processes.
"""
