"""What a run shows: figures, curves, held-out loss, pictures, loggers."""
