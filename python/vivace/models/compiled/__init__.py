"""Networks compiled for an executor, model by model."""
