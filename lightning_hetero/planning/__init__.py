"""How much each rank computes: plans, what they follow from, and what they bring; pure functions of numbers.

May import numpy and nothing else, so it works without torch.
"""
