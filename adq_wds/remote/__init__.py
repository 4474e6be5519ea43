"""Fetches shards from URLs, commands and packed files, and caches them."""
