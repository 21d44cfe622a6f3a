"""From a prompt, and what else is given, to videos."""
