"""Temperature scaling: exits whose confidence is the probability to agree with the final exit."""
