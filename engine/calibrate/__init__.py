"""Measuring a model on the trajectory it will run: tables of what was measured, and which evaluations to measure on."""
