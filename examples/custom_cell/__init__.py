"""A model with recurrent cells that `xlstm-export` does not know, and adapters for them."""
