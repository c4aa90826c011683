"""Checkpoints made of checkpoints: other exits, another layout, a mean of several.

Everything is read and written tensor by tensor, on the CPU, by one process; only class-aware
initialization runs the model.
"""
