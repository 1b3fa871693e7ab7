"""Drafters: the DSpark module, its heads, its context, and the link to a drafter in another process."""
