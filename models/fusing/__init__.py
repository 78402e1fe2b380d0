"""What `models.reparam` works with: what flows where, which pairs fold, and the arithmetic."""
