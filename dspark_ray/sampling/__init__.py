"""From logits to tokens: edits, temperature, filters, noise."""
