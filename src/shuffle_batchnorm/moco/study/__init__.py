"""The law of the leak: many small runs, one table, a fit."""
