"""Reports on plans, codebooks and patches, for people."""
