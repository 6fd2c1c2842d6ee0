"""What a recipe needs and the hosts lack."""
