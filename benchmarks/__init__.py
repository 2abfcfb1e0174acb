"""`make bench`: every figure that the project claims, measured here and now, one row each."""
