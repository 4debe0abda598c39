"""What a rank measures and sets on its own device: compute time, memory, speed, the CPU's allocator.

May import torch; it talks to no other process.
"""
