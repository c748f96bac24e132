"""What a pass takes: here by the clock or NVML, elsewhere by a data sheet."""
