"""Policy losses, and what weighs their terms: advantages, corrections and reward shaping. Imports no other room."""
