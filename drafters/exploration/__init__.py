"""Formats of numbers compared: on random vectors, on a model, and as drafters. May import training."""
