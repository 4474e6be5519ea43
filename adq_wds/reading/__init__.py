"""Kept samples out of shards, local or remote, and nothing else."""
