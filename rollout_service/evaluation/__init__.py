"""Commands that measure: compare."""
