"""Networks and other sources of embeddings, each in its own file; nothing is loaded from here."""
