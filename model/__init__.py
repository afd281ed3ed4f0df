"""Token ids -> hidden states -> logits -> samples. Imports neither data nor rlhf."""
