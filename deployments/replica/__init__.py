"""The Engine deployment: a replica, its gang of worker actors, and the channel between them."""
