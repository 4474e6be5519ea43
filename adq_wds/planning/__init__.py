"""Features to bins, to a plan or a codebook."""
