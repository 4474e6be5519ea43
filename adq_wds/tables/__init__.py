"""Tables of features, bins and plans: checked when made, loaded and saved."""
