"""The HTTP side: routes, schemas, answers, keys, and the client of the Engine deployment."""
