"""Runs one task a shard, in threads."""
