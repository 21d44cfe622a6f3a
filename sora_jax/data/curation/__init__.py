"""Curation of clips: stages score, a policy filters, every decision is recorded."""
