"""What connects to a Lightning Trainer: loaders, evaluation, logged values, early stops, reports.

May import `step` and whatever that may import; only it and `strategy.py` use private parts of Lightning.
"""
