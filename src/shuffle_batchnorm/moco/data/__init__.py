"""Reading images."""
