"""Every quantity of the training step as pure functions of tensors: no configuration objects, no I/O.

The choices compose and never name an algorithm; each is a visible table of small functions:
`advantage.ADVANTAGE_ESTIMATORS`, `reward_norm.REWARD_NORMS`, `ratio.RATIOS`, `aggregate.LOSS_AGG_MODES`,
`kl.KL_ESTIMATORS`. Legend of the package: B samples, T response positions, n_i valid tokens of sample i.
"""
