"""Importances of the patches of an image."""
