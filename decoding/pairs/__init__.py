"""Target and draft: loaded, checked, described."""
