"""Attention kernels and other accelerator code; imports nothing from the rest of the package."""
