"""Recipes: `base` holds every field once, each child changes a few."""
