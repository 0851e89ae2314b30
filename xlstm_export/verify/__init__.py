"""Checks of an export against the model it was made from, and their limits."""
