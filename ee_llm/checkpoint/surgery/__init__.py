"""Derives checkpoints from checkpoints: with other exits, another layout or averaged weights.

A single process reads and writes one tensor at a time on the CPU. Only class-aware initialization
runs the model.
"""
