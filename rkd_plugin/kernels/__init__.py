"""The kernels: interchangeable files that compute the same two losses.

Every kernel file has three functions with these names, arguments, values and gradients:

``relations(x)``
    What the other two functions need of one side ``(N, D)``, after ``pairwise.rescale``. Differentiable.
``distance(student, teacher, huber_delta, pairs=None)``
    ``(N,)``: for every row, the Huber loss between normalised distances summed over the pairs that start there.
``angle(student, teacher, huber_delta, triplets=None, vertices=None)``
    ``(N,)``: for every row, the Huber loss between cosines summed over the triplets that have their vertex there; or
    ``(vertices,)``: for the first ``vertices`` rows only, at the same fraction of the cost.

``student`` and ``teacher`` are results of ``relations``. Without index tuples the sums run over all pairs and
triplets; those that name a row twice add exactly zero. ``pairs`` is ``(from, to)`` and ``triplets`` is
``(vertex, arm, arm)``, index vectors of one length.

``reference`` is the readable one: the oracle of all tests, with derivatives of every order. ``chunked`` runs on any
device: ``native`` computes its losses on a CPU with a C++ compiler, ``strips`` its cosines anywhere else. ``fused`` is
for GPUs; it is the only file that imports Triton, and it is imported on first use. They share ``pairwise``: the scale
of a batch, its squared distances and its mean distance. ``potentials`` computes every other relation, with
``functions`` of the user and ``neighbours``, in strips that are computed again in the backward pass. ``operators``
registers an angle loss with PyTorch. ``choose`` picks a kernel, and ``derivatives`` raises for a derivative that a fast
kernel does not have.

A kernel may also have ``sums``, which computes both losses of all pairs and triplets from the rows in one operator;
`chunked.sums` describes it.

Limits. The error of a gradient is relative to its largest entry; the gradient of a row far from all others is much
smaller than that. Distances below 2^-500 of the largest difference count as 0, which only float64 inputs can have. A
function compiled by ``torch.compile`` has no second derivative: for any function that saves its output, PyTorch gives a
wrong one without an error.
"""
