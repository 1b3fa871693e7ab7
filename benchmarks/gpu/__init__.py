"""What only a GPU can tell: kernels, rounds, and the stages of `benchmarks.gpu_day`."""
