"""How weights change: optimizers, averages, parallelism, and steps that are not made."""
