"""What leaves for a board: a folder or archive with everything that is needed there."""
