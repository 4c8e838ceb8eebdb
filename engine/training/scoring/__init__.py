"""How good a model is: scores of a classifier, and what a fine-tuning is looked at by."""
