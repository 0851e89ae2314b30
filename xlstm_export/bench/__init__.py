"""Speed of an export, beside PyTorch and the limits of the machine."""
