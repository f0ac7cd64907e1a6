"""Models: the native DiT, its checkpoints, prompts and pictures."""
