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

``reference`` is written to be read and is the oracle of all tests; ``chunked`` runs on any device; ``fused`` is for
GPUs: the only file that imports Triton, and imported on first use itself. What they share, ``pairwise``, holds no loss:
the scale of a batch, its squared distances and its mean distance.
"""
