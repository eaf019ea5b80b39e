"""The groups of `r1s` commands; each command is a thin call into the module that does the work."""
