"""The processes of one engine: what each rank runs, and the messages between ranks."""
