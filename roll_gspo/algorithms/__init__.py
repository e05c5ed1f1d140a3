"""The mathematics of a training step as pure functions of tensors: no configuration objects, no I/O.

These functions are public: docs/python-api.md lists them.

Each axis of the algorithm is a set of small functions, selected by name:

* rewards to advantages: `reward_norm.REWARD_NORMS`, the estimators of `advantage_estimators`;
* the policy loss: the ratios of `ratio`, the losses of `objective`, `aggregate.LOSS_AGG_MODES`, `kl.KL_ESTIMATORS`,
  `correction.CORRECTION_LEVELS` and `CORRECTION_MODES`;
* samples in the loss and their weights: `query_filter`, `sample_weighting`.

Estimators, ratios and losses carry a decorator of `roll_gspo.declarations` that states what they need; users add their
own by dotted path. The schema validates every setting, so that nothing here does. `policy_loss` and `value_loss`
combine the parts. Legend of the package: B samples, T response positions, n_i valid tokens of sample i.
"""
