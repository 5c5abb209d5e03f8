"""The two training loops, and what they share: pulling rollouts and pushing weights. May import every other room."""
