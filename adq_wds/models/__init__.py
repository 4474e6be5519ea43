"""Networks and other sources of embeddings, each in its own file; nothing is loaded from here."""

BUILTIN_NAMES = ("builtin", "builtin-free")
SHIPPED_ENCODERS = (*BUILTIN_NAMES, "thumbnail")
