"""A step that a bad number made impossible, computed again."""
