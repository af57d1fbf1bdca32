"""The web page. It imports nothing from `clipgen.cli`."""
