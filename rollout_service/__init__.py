"""The server: HTTP front, batch queue, Ray fleet, vLLM engines, weight versions. Imports drafters, never rl_loop."""
