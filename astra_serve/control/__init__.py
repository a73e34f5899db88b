"""From the document to what is served, and the admin API that changes the document."""
