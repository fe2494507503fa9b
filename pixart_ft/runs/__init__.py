"""What a run leaves on the disk: its folder and checkpoints, the lock, the log's file."""
