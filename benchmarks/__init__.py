"""What ampd costs on the wire, on the clock and at start, beside its peers."""
