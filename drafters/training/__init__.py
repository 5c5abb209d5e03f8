"""Training of a drafter, offline or while its policy is trained. May import learners."""
