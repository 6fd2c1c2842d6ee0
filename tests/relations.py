"""`relational_loss` with each named potential and each kind of function, as losses for the parametrised tests."""

from __future__ import annotations

from rkd_plugin import relational_loss


def relation(name, order, *invariant, potential, repeats_add_nothing=False, **fixed):
    """The loss as a function with a name; the other arguments describe it."""

    def loss(student, teacher, **options):
        return relational_loss(student, teacher, potential, **{**fixed, **options})

    loss.__name__, loss.order, loss.invariant = name, order, set(invariant)
    loss.repeats_add_nothing = repeats_add_nothing  # tuples that name a row twice
    return loss


def entropy(x):
    return -(x.softmax(-1) * x.log_softmax(-1)).sum(-1)


def spread(x, y):
    return (x - y).square().mean(-1)


def turn(x, y, z):
    return ((y - x) * (z - x)).mean(-1)


RELATIONS = [
    relation("entropy", 1, potential=entropy, penalty="l1"),
    relation(
        "distance_l1", 2, "shift", "scale", "rotation", potential="distance", penalty="l1", repeats_add_nothing=True
    ),
    relation(
        "squared_distance", 2, "shift", "scale", "rotation", potential="squared_distance", repeats_add_nothing=True
    ),
    relation("dot_mse", 2, "scale", "rotation", potential="dot", penalty="mse"),
    relation("cosine_mse", 2, "scale", "rotation", potential="cosine", penalty="mse", repeats_add_nothing=True),
    relation("cosine_pkt", 2, "scale", "rotation", potential="cosine", penalty="kl", scale="row_sum"),
    relation(
        "cosine_softmax", 2, "scale", "rotation", potential="cosine", penalty="kl", scale="softmax", temperature=0.2
    ),
    relation("gaussian_js", 2, "shift", "rotation", potential="gaussian", penalty="js", scale="row_sum"),
    relation("angle_l1", 3, "shift", "scale", "rotation", potential="angle", penalty="l1", repeats_add_nothing=True),
    relation(
        "function_of_2", 2, "shift", "scale", "rotation", potential=spread, scale="mean", repeats_add_nothing=True
    ),
    relation("function_of_3", 3, "shift", "rotation", potential=turn),
]
