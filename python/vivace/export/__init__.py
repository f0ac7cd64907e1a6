"""Packs, engines and model repositories from a model and its plan."""
