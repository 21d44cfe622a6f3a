"""Clip records, video shards, captions, tokens and the loader."""
