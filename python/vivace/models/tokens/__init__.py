"""Rows that compute some of the image tokens, and tokens that are merged, in networks."""
