"""Drafters: the DSpark module, its heads and context cache, and the messages between verifier and drafter."""
