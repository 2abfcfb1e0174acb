"""Runs a stage over its shards: plan, lease, Ray workers, progress, report."""
