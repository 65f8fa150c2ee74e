"""One small module per framework, imported where its user asks for it; each needs that framework."""
