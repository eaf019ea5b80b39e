"""Speed, memory and recall on this machine, beside other libraries: `python -m benchmarks`."""
