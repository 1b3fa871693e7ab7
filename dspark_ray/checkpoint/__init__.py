"""Checkpoints in the official file layout: reading one rank's slices, writing, quantising, describing."""
