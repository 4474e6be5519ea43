"""The data set, its order and state, and its loaders and nodes."""
