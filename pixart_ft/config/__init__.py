"""What a user may say: the words, their defaults and limits, YAML and the command line. No torch."""
