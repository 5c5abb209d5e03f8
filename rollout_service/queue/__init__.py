"""The batch queue: prompts in, finished groups out under leases. May import the fleet, which generates the groups."""
