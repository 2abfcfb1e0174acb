"""Latents and token vectors from MDS shards to batches."""
