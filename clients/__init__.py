"""Teachers, caches, and the Python client of the PerSyn service."""
