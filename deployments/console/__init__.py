"""The `dspark-ray` command. Commands that talk HTTP to a server need neither Ray nor torch."""
