"""One run: a recipe that is built, trained, measured and kept."""
