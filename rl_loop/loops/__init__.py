"""The two training loops and what they share: pulling rollouts, pushing weights. May import every other room."""
