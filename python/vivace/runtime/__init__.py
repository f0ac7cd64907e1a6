"""Runs a pack: the whole loop without torch."""
