"""The format of tars of samples, and the names of shards."""
