"""Pictures and captions: read from a folder, prepared one way only, encoded once into a cache on disk."""
