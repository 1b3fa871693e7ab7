"""Which drafts are verified, and which of them stand."""
