"""What a model is worth: tasks of the lm-evaluation-harness, multiple-choice files, and perplexity.

`scoring` computes log-likelihoods of token sequences on any mesh; `requests` turns texts into these; `perplexity` and
`choices` need nothing else. `lm` and `harness` stand between that and EleutherAI's lm-evaluation-harness, which is an
extra (`pip install 'meshgpt[eval]'`) and is imported only when a task is asked for. `results` keeps what came out.
"""
