"""What files pasted from elsewhere import: stand-ins of ours for names and paths that do not exist here."""
