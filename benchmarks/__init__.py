"""One module per question; see README.md here."""
