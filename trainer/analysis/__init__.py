"""`astra-train analyze DIR`: an HTML report about a finished run, made from the files in its folder."""
