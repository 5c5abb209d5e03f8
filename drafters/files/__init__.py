"""Files and folders: checkpoints, text lines, writing that lasts. Imports no other room."""
