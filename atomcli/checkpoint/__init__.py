"""Models on disk: lazy sources to read parents from, and the checkpoint that atom writes and verifies."""
