"""The families of models: per family one module that loads its checkpoints and one with its cells."""
