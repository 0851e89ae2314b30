"""The adapters of the published cells; importing a module registers its cells."""
