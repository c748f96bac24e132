"""Methods side by side: rows, turns, summaries, pages, plots."""
