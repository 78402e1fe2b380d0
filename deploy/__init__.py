"""A trained model elsewhere: exported files written, compared and run, the hub, results."""
