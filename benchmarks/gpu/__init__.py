"""Measurements on a GPU: kernels, rounds, and the stages of `benchmarks.gpu_day`."""
