"""Adapters: what other trainers need beside their own code. Each adapter is one file, and imports the client."""
