"""Loading: from a path or a factory to a model that can be lifted and traced."""
