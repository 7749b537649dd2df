"""Measurements: ratios within one run, variants interleaved, with the noise floor beside them."""
