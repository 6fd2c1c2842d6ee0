"""The kernels: interchangeable files that compute the same two losses.

Every kernel file holds three functions with these names, arguments, values and gradients:

``relations(x)``
    What the file needs to know of one batch ``(N, D)``, in the scale of ``pairwise.rescale``. Differentiable.
``distance(student, teacher, huber_delta, pairs=None)``
    ``(N,)``: for every row, the Huber loss between normalised distances summed over the pairs that start there.
``angle(student, teacher, huber_delta, triplets=None, vertices=None)``
    ``(N,)``: for every row, the Huber loss between cosines summed over the triplets that have their vertex there; or
    ``(vertices,)``, for the first so many rows alone, at that share of the cost.

``student`` and ``teacher`` are results of ``relations``. Without index tuples the sums run over all pairs and
triplets; those that name a row twice add exactly zero. ``pairs`` is ``(from, to)`` and ``triplets`` is
``(vertex, arm, arm)``, index vectors of one length.

``reference`` is written to be read, is the oracle of all tests and has derivatives of every order; ``chunked`` runs on
any device; ``fused`` is for GPUs: the only file that imports Triton, and imported on first use itself. What they share,
``pairwise``, holds no loss: the scale of a batch, its squared distances and its mean distance. ``choose`` picks a
kernel, and ``derivatives`` makes a derivative that a fast kernel does not have an error.

Limits. Errors of a gradient are relative to its largest entry: that of a row far from all others is itself much
smaller. Distances below 2^-500 of the largest difference count as 0, which only float64 inputs can have. A function
that ``torch.compile`` compiled has no second derivative; PyTorch gives a wrong one, of any function that saves its
output, without an error.
"""
