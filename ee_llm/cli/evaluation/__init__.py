"""The commands that run a model over given text."""
