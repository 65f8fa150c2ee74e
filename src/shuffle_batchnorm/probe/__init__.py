"""What leaks, and what grows with depth, measured."""
