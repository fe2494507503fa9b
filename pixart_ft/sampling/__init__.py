"""From a caption to a picture: what may be asked for, the loop, the pipeline, the command."""
