"""What a run was, from its folder: plots, a model card, a page to look at, and runs beside each other."""
