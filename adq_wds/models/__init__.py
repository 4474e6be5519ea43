"""Which networks and other sources of embeddings are there? Each in its own file; nothing is loaded from here."""
