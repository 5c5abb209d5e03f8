"""Policy losses, and what weighs their terms: advantages, corrections, shaping. Imports no other room."""
