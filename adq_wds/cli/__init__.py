"""The command `adq`: arguments in, exit codes out."""
