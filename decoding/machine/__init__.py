"""The cost of a pass: here by the clock or NVML, elsewhere by a data sheet."""
