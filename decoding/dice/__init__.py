"""What is drawn and what is accepted: joint distributions, random numbers, verdicts."""
