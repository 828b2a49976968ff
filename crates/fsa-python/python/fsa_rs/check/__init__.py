"""``python -m fsa_rs.check``: proves an installation on the machine that it runs on.

Prints versions and devices, then computes small cases with every function and holds results and gradients against
definitions in NumPy, in float64, that share nothing with the code under test. Exits with 0 if all agree, else with 1.
"""
