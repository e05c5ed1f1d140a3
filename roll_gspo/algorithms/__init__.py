"""Every quantity of the training step as pure functions of tensors: no configuration objects, no I/O.

The choices compose and never name an algorithm; each is a visible table of small functions:

* rewards to advantages: `reward_norm.REWARD_NORMS`, `advantage.ADVANTAGE_ESTIMATORS`;
* the policy loss: `ratio.RATIOS`, `objective.POLICY_LOSSES`, `aggregate.LOSS_AGG_MODES`, `kl.KL_ESTIMATORS`,
  `correction.CORRECTION_LEVELS` and `CORRECTION_MODES`;
* which samples count, and how much: `query_filter`, `sample_weighting`.

`policy_loss` and `value_loss` put them together; `routing` compares the experts of two passes through a mixture of
experts. Legend of the package: B samples, T response positions, n_i valid tokens of sample i.
"""
