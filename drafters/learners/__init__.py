"""Drafters as torch modules to train. May import kinds and files."""
