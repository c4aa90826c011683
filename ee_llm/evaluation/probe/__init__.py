"""Find the boundaries where exits belong, with least-squares exits after every layer."""
