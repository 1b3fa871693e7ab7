"""Shared by benchmarks: gangs, applications, saved results, provenance."""
