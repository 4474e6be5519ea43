"""Who does one task a shard: threads."""
