"""What touches activations, and knows no rank: four heavy kernels, and rows between them."""
