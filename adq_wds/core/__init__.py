"""Arrays in, arrays out: no files, no globals, no torch modules."""
