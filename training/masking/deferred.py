"""Deferred masking (MicroDiT, arXiv 2407.15811): the mixer sees all patches, the backbone some."""

from training.masking.scheme import Scheme


class Deferred(Scheme):
    """Tokens are dropped after the patch-mixer, at random, each for itself."""
