"""What a run must not lose: checkpoints, and which of its groups are where. May import learner and losses."""
