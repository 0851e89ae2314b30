"""The command line: commands, terminal tables and `doctor`. No logic lives here."""
