"""Programs that call the admin API of one server or of several."""
