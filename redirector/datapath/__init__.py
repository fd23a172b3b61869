"""The kernel side as Python sees it: compile and load, pins, typed maps, links."""
