"""Hosts and networks: where samples are read from and written to."""
