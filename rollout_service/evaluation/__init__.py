"""Commands that measure: compare, audit, calibrate. May import fleet, engine and client, not http."""
