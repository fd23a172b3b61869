"""What the product costs a node: figures for its makers, beside the comparison for its users.

`make bench-node`, or `python -m redirector.bench.command`. Each room of figures is a function that
is given a `Ground` and answers lines; `command` calls them one after the other.
"""
