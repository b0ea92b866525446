"""What a model can do: tasks make requests, a backend answers them, the task scores the answers."""
