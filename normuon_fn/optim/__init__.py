"""The shells around the step: an optimizer for trainers, and lists for people who own their state.

What happens here: parameter groups become names, routes and one `Hyper` (groups, hyper); the sets
of parameters that have gradients become plans (planned); ``optimizer.state`` owns all state, which
is collected for a plan (state); what a ``state_dict`` has for each parameter and group is found by
name (saved, matching); `NorMuon` puts these together (normuon). `foreach_step_` finds its plan by
its lists (foreach, list_plans). Read in this order: normuon, planned, state, saved, matching,
hyper, written_rates, groups, foreach, list_plans; for frameworks that make the optimizer: trainer,
trainer_arguments. This wing must never know how a step is computed or which ranks own what.
"""
