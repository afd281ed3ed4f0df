"""PPO: the roles and their layouts, rollouts, the update, the memory plan, the self-check."""
