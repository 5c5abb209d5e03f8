"""What a run measures and shows: metrics, logs, plots, the terminal. Imports no other room."""
