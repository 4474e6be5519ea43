"""Reads kept samples from shards, local or remote, and nothing else."""
