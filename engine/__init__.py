"""What the scripts share: command-line flags, setting a run up, keeping and restoring its state."""
