"""Forwards recorded as CUDA graphs and replayed."""
