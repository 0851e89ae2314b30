"""A model with recurrent cells that `xlstm-export` does not know, and the adapters that make them known."""
