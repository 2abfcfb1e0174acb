"""`make tiny-weights`: trains the small encoders that ship with the package, on OpenMoji alone."""
