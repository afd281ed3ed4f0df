"""Holds the numbers of other frameworks against ours and names the convention behind each difference."""
