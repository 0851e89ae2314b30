"""`python -m xlstm_export`: the command line."""

from .cli.main import main

main()
