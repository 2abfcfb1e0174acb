"""What a run leaves: checkpoints, weights, their copies elsewhere, and the way back in."""
