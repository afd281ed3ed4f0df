"""Reward models: pooling and heads, fits, losses, files, and the scorer that PPO asks."""
