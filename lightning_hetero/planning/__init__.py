"""How much each rank computes: plans, the measurements behind them, and their effect; pure functions of numbers.

May import numpy and nothing else, so it works without torch.
"""
