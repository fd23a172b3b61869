"""`redirector flows`: each connection as it opens and closes, or what is open now."""
