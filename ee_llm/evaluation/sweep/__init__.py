"""Measure the speed and the quality of exit policies and drafts by generating text."""
