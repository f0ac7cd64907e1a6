"""Where time goes (`request`), and what a machine has (`doctor`, which needs no torch)."""
