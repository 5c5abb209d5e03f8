"""The policy that is trained: forward and backward over rollouts, optimiser. May import losses; knows no service."""
