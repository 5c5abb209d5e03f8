"""The fleet: starts and restarts the engines, routes requests and pushes to them. May import weights and engine."""
