"""One stage: its model, objective, loop and scores."""
