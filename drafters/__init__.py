"""Speculation itself: kinds of drafter, their training, lossless verification. Imports no HTTP, no Ray, no trainer."""
