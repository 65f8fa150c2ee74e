"""The layer: who normalises whom, the statistics, the gradient, conversion."""
