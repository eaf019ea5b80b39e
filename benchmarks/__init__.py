"""Speed, memory and recall on this machine, beside what others use: `python -m benchmarks`."""
