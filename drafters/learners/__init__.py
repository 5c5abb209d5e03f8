"""Drafters as torch modules that can be trained. May import kinds and files."""
