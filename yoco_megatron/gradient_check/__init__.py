"""A model on a mesh beside the same model in one process: every parameter's gradient of the trainer's first step."""
