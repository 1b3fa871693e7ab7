"""Measuring what speculation brings on held-out text."""
