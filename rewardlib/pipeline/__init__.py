"""What steps 5 to 8 share."""
