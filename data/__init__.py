"""Text -> token files -> batches. Imports neither model nor rlhf."""
