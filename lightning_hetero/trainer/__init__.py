"""What connects to a Lightning Trainer: loaders, evaluation, logged values, checkpoints, reports.

May import `step` and whatever that may import; only it and `strategy.py` use private parts of Lightning.
"""
