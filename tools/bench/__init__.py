"""Benchmarks: each module is a script that prints a table and writes its figures as JSON."""
