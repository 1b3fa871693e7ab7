"""One module per model family: how a chat's messages become a prompt."""
