"""Samples to new shards: whole, or with fewer patches and at another size."""
