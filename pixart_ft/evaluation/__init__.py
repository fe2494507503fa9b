"""How good a network is: its objective, and that of pictures it never saw."""
