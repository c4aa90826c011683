"""Training: the loop, the optimizer and its schedules, logging; `trainer.train` runs it all."""
