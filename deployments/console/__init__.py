"""The `dspark-ray` command: it talks HTTP and needs neither Ray nor torch for that."""
