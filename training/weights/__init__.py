"""Weights files: tensors with all that is needed to paint with them, ours and official ones."""
