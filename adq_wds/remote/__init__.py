"""Bytes that are not in a plain local file: URLs, commands, packed shards, and a cache for them."""
