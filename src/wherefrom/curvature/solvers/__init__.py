"""Iterative solvers: what becomes of query gradients with the exact curvature, where a filter is an approximation.

H is the exact curvature, D the damping, g the queries' gradients. The filter alone (EK-FAC, say) takes H to be
something that it is not: block-diagonal, of Kronecker products. All vectors are the rows of matrices [queries,
weights], so that every product with H is one pass for all queries. These modules are tensor algebra; they know nothing
of models, layers or datasets.
"""
