"""Weight versions: what is in service, what an update must hold, where its bytes lie. May import the engine."""
