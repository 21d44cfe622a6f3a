"""Captions for clips: who writes them, which are kept, and how they get into shards."""
