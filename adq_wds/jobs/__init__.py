"""Whole jobs of the command, a file each: run, index, verify, pack, pictures of patches."""
