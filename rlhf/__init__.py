"""The formulas (pure functions on tensors), then what joins them to a model."""
