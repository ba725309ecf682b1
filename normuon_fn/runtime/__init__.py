"""How a step runs: compiled, or captured in a CUDA graph.

What happens here: `step` and `step_` compile one graph per plan (compiled), whose lists of
parameters, gradients and state stay outside of it (outside), and say so if that takes long
(long_compilation); or they run as they are written where there can be no graph (eager).
`GraphedStep` captures `step_` and replays it as long as its inputs are the same (graphed, inputs),
on streams that are used again (streams). Read in this order: compiled, outside, eager, graphed,
inputs, streams. This wing must never know what a step computes; it calls it with the arguments that
it was called with.
"""
