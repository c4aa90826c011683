"""Benchmarks. Each script prints a table and can write its figures as JSON."""
