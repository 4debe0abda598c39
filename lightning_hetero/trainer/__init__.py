"""What reaches into a Lightning Trainer: loaders, evaluation, logged values, checkpoints, reports.

May import all floors before it; nothing else touches the private parts of Lightning.
"""
