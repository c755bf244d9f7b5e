"""The page that shows search results in a browser, and its server."""
