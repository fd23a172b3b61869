"""What a comparison tells: on the terminal, as JSON, as a page. Pure."""
