"""Where rooms meet: each job a screen or two, each file one command."""
