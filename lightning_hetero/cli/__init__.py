"""The command `lightning-hetero`.

May import everything.
"""
