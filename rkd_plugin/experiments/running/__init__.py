"""One run: building, training and measuring a recipe, and saving the results."""
