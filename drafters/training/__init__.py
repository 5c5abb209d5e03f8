"""Training a drafter, offline and along with its policy. May import learners."""
