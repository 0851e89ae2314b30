"""A path or a factory becomes a model that can be lifted and traced."""
