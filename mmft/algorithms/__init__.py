"""Pure maths on tensors: statistics, KL, token rewards, returns, losses. Needs torch and nothing else.

Shapes: N responses (the G responses of one prompt stand next to each other), T response tokens, V vocabulary.
Every mask is bool, True = takes part. What stands in a tensor where the mask is False is never read: NaN or inf
there changes neither a value nor a gradient. KL, entropy and log-probabilities are in nats.
"""
