"""Files that are whole or not there: state files, checkpoints, logs."""
