"""Policies decide how wide and how deep, before the target has spoken."""
