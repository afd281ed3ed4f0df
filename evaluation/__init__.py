"""What evaluate.py measures: one file per command. Imports data, model and rlhf; the scripts import it."""
