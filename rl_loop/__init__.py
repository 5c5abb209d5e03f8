"""The learner: tasks, rewards, losses, two training loops. Imports drafters, and the server's client and protocol."""
