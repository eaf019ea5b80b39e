"""Checks whatever is read from outside; every other room may import this one."""
