"""The teacher bank: precomputed outputs of a teacher for every item of a data set; on torch and NumPy alone."""
