"""Processes of one engine: which rank runs what, and what ranks tell each other."""
