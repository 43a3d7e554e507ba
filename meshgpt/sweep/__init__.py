"""`meshgpt sweep`: the same recipe with other numbers, many times, and which were best.

`space` says what is tried, `trials` keeps what became of it, `runner` trains, `outcome` compares.
"""
