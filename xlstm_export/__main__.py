"""`python -m xlstm_export`: the command line."""

from .cli import main

main()
