"""Pages of the KV cache, and the tensors they index."""
