"""A result on the Hub: its card, and what is pushed."""
