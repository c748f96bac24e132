"""One pass of one model: tensors, no prompt."""
