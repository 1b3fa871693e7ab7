"""The DeepSeek-V4 target: its layers, the rows of a step, and the ranks that share a layer."""
