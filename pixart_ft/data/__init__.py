"""Captioned pictures: read from a folder, encoded once into a cache on disk."""
