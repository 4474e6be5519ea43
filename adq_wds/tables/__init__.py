"""Features, Bins, Plan: checked when made, when loaded, when saved."""
