"""Writes samples to new shards: unchanged, or with fewer patches or at another size."""
