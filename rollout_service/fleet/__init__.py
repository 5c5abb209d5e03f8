"""The fleet: starts, routes to, re-weights and restarts the engines. May import weights and engine."""
