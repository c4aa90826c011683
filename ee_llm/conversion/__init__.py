"""Converts models of other software to checkpoints and back, with tables of names and shapes.

A single process reads and writes one tensor at a time on the CPU.
"""
