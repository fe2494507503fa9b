"""Pictures for people: labelled sheets, curves, and PNG files that say what they were drawn by."""
