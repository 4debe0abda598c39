"""The command `lightning-hetero`: its arguments, help and exit status; `lightning_cli` runs Lightning's own commands.

May import everything.
"""
