"""Known recurrent cells become modules that call the two operators, with their state outside."""
