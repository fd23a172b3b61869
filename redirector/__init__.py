"""The node side: datapath, modes, lab, comparison, CLI."""
