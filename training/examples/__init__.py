"""Public data sets in the forms of `training.data`, with the metrics that fit them.

Examples to copy from; nothing else imports them.
"""
