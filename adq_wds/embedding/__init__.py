"""Shards to features: one file of features per shard, resumable."""
