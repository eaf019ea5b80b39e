"""The `r1s` commands, one module per group; each command calls the module that does the work."""
