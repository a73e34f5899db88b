"""How much of the server a tenant may use: requests and tokens per minute, tokens per day, requests at a time."""
