"""Train a draft for a target: text that the target writes, then a head over its hidden states.

    python -m decoding.train_draft pair=smollm2 out=heads/smollm2

`text.py` has the target write, `states.py` reads what a head learns from, `eagle3.py`, `fspad.py`,
`chimera.py` and `model.py` fit one, each as its paper has it.
"""
