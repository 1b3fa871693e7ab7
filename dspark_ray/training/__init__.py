"""Training of the tiny model: its corpus, its tokenizer and its optimisation."""
