"""Train and tune models: the loop, the optimizer, schedules and reports (`trainer.train`)."""
