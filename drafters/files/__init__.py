"""Files and folders: checkpoints, text lines, durable writes. Imports no other room."""
