"""What a tar of samples is, and what shards are called."""
