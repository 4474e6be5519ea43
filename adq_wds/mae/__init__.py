"""Masked autoencoders, and the rebuilding of dropped patches."""
