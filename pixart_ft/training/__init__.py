"""From a configuration to a finished run: checked, encoded, trained, watched, reported."""
