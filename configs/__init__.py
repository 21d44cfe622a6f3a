"""Recipes: `base` holds every field, each recipe sets its own."""
