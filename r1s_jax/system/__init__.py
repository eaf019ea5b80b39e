"""This process and its machine: files, assets, terminal, other processes, chips."""
