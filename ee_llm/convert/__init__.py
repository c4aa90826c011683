"""Models from elsewhere and back: tables of names and shapes, read in both directions.

Everything is read and written tensor by tensor, on the CPU, by one process.
"""
