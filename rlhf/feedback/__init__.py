"""Votes of people: the store, its exchange formats, raters' agreement, and the terminal."""
