"""Speculation itself: kinds of drafter, their training, lossless verification. Knows no HTTP, no Ray, no trainer."""
