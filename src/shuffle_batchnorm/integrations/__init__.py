"""One small module per framework, imported by who uses it."""
