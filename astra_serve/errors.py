"""What can be wrong with what a user hands to the server."""


class ServeError(ValueError):
    """The message is one line that says what is wrong and what to do."""
