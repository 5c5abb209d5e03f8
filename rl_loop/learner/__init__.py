"""The learner: forward and backward over rollouts, the optimiser, and the online drafter. It knows no service."""
