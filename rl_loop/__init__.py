"""The trainer: tasks, rewards, losses, two training loops. It imports drafters and the server's client and protocol."""
