"""Plan, label, sample, split, store and read pairs of slice and context.

`spec`, `plan` and `reading` serve training and prediction alike; the other modules make training data.
"""
