"""Shared by the benchmarks: gangs, applications, finished parts, provenance."""
