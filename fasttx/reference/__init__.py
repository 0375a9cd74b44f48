"""Plain PyTorch: the authority in tests, and a backend like any other."""
