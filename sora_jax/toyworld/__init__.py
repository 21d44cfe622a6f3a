"""A procedural video world with exact state, captions and an oracle (NumPy only)."""
