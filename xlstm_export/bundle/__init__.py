"""Bundles: a folder or archive with everything that a board needs to run an export."""
