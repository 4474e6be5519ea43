"""How much each patch of an image matters."""
