"""How ranks talk to each other, and what happens when one fails; knows no layer."""
