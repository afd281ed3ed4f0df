"""What is wrong with a PPO run, read from the numbers and samples that it left."""
