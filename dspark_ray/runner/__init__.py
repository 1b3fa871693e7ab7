"""How forwards run that come again and again."""
