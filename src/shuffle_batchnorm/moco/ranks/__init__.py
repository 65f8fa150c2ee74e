"""Starting ranks, and what they tell each other."""
