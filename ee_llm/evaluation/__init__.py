"""Measure how well each exit of a model predicts given text."""
