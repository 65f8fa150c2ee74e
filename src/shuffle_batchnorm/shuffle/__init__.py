"""Samples move between ranks and back: MoCo's own way of shuffling."""
