"""Draft, verify, commit: one prompt, then several."""
