"""State that a run must not lose: checkpoints, and where each of its groups is. May import learner and losses."""
