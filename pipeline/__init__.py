"""Offline half: from a dataset's name to cached latents in MDS shards."""
